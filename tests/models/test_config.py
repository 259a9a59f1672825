from __future__ import annotations

import subprocess
import sys

import pytest

from tpcore.models.config import PRESETS, BertConfig, padded_vocab_size_for


@pytest.mark.parametrize(
    ("vocab_size", "tp_size", "expected"),
    [
        (30522, 1, 30592),
        (30522, 2, 30720),
        (30522, 8, 30720),
        (28996, 1, 29056),
        (28996, 4, 29184),
        (28996, 8, 29696),
        (128, 1, 128),
    ],
)
def test_vocabulary_is_padded_by_megatrons_rule(vocab_size, tp_size, expected):
    assert padded_vocab_size_for(vocab_size, tp_size) == expected


def test_defaults_are_derived_once():
    config = BertConfig(vocab_size=10, hidden_size=8, num_attention_heads=2)
    assert config.intermediate_size == config.feed_forward_size == 32
    assert config.head_size == 4
    assert config.lm_head_gelu == "none"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 10, "num_attention_heads": 3}, "cannot be split over"),
        ({"num_layers": 0}, "num_layers=0 is not a positive integer"),
        ({"hidden_dropout": 1.0}, r"hidden_dropout=1.0 is not a probability in \[0, 1\)"),
        ({"gelu": "relu"}, "gelu='relu' is unknown; use one of none, tanh, erf_1.41421"),
        ({"padded_vocab_size": 5}, "padded_vocab_size=5 is below vocab_size=10"),
        ({"layernorm_eps": 0.0}, "layernorm_eps=0.0 is not positive"),
        ({"num_token_types": -1}, "num_token_types=-1 is negative"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(vocab_size=10, **values)


def test_dict_round_trip_and_suggestion():
    config = PRESETS["megatron-bert-345m-uncased"].replace(gelu="tanh", num_layers=2)
    assert BertConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"hiden_size is not a field.*did you mean hidden_size"):
        BertConfig.from_dict({"vocab_size": 10, "hiden_size": 8})
    with pytest.raises(ValueError, match="vocab_size is missing"):
        BertConfig.from_dict({"hidden_size": 8})


def test_configuration_needs_no_torch():
    code = "import sys, tpcore.models.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("layernorm_eps", value) for value in ("a", None, 0, True, float("nan"), float("inf"))),
        *(("hidden_dropout", value) for value in ("a", None, True, [0.1])),
        *(("init_std", value) for value in ("a", -1, None, float("nan"))),
        *(("post_layernorm", value) for value in ("maybe", 1, None)),
        *(("hidden_size", value) for value in ("a", None, 10**9, [1], True)),
        *(("num_token_types", value) for value in ("a", -1, None, True)),
        *(("padded_vocab_size", value) for value in ("a", 1.5, True)),
        ("intermediate_size", 10**9),
        ("add_pooler", "no"),
        ("gelu", ["none"]),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        BertConfig(**{"vocab_size": 8, field: value})
