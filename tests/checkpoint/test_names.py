"""The name tables: one-to-one, complete, and strict."""

import re

import pytest

from tpcore.checkpoint import CheckpointError, names
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.heads import HEADS, build_head
from tpcore.parallel.group import TensorParallelGroup

TABLES = {
    "megatron": names.MEGATRON,
    "megatron-core": names.MEGATRON_CORE,
    "bert": names.BERT,
    "megatron-bert": names.MEGATRON_BERT,
}
every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


@every_table
def test_tables_are_one_to_one(table):
    for layers in (1, 3):
        targets = [name for name in names.expand(table, layers).values() if name is not None]
        assert len(set(targets)) == len(targets)


@every_table
def test_tables_lead_to_canonical_names(table):
    for target in names.expand(table, 2).values():
        if target is not None:
            whole = re.sub(r"\.qkv\.(query|key|value)\.", ".qkv.", target)
            assert names.parameter(whole)


@every_table
def test_every_encoder_parameter_has_a_name(table):
    targets = {
        re.sub(r"\.qkv\.(query|key|value)\.", ".qkv.", name)
        for name in names.expand(table, 2).values()
        if name is not None
    }
    for pattern in names.PARAMETERS:
        if not pattern.startswith("head."):
            assert pattern.replace("{}", "0") in targets
            assert pattern.replace("{}", "1") in targets


@every_table
def test_no_alias_touches_a_name_of_its_table(table):
    aliases = {
        id(names.MEGATRON): names.MEGATRON_ALIASES,
        id(names.MEGATRON_CORE): names.MEGATRON_CORE_ALIASES,
    }.get(id(table), names.HUGGINGFACE_ALIASES)
    keys = list(names.expand(table, 2))
    assert list(names.apply_aliases(keys, aliases, "x")) == keys


@pytest.mark.parametrize("head", [None, *HEADS])
def test_parameters_are_those_of_the_model(head):
    config = BertConfig(
        vocab_size=128, hidden_size=8, num_layers=2, num_attention_heads=2, intermediate_size=16
    )
    tp = TensorParallelGroup.single()
    kwargs = (
        {"num_labels": 3} if head in ("sequence_classification", "token_classification") else {}
    )
    model = BertModel(config, head=build_head(head, config, tp=tp, **kwargs) if head else None)
    table = model.sharding_table()
    for name, tensor in model.state_dict().items():
        entry = names.parameter(name)
        assert table[name] == entry.sharding, name
        assert len(entry.dims) == tensor.dim(), name
    listed = {name.replace(".0.", ".{}.").replace(".1.", ".{}.") for name in model.state_dict()}
    encoder = {name for name in names.PARAMETERS if not name.startswith("head.")}
    assert encoder <= listed


def test_norms_of_original_bert_belong_to_the_block_that_follows():
    table = names.expand(names.BERT, 3)
    assert table["embeddings.LayerNorm.weight"] == "blocks.0.input_norm.weight"
    assert table["encoder.layer.0.output.LayerNorm.weight"] == "blocks.1.input_norm.weight"
    assert table["encoder.layer.2.output.LayerNorm.bias"] == "final_norm.bias"
    attention = "encoder.layer.1.attention.output.LayerNorm.weight"
    assert table[attention] == "blocks.1.post_attention_norm.weight"


def test_unknown_keys_are_all_listed_with_a_hint():
    known = names.expand(names.MEGATRON, 1)
    keys = ["lm_head.bias", "lm_head.biass", "nonsense"]
    with pytest.raises(CheckpointError) as error:
        names.translate({key: key for key in keys}, known, "file.pt")
    text = str(error.value)
    assert "file.pt" in text
    assert "lm_head.biass, nonsense" in text
    assert "lm_head.biass resembles lm_head.bias" in text


def test_dropped_names_are_known_but_lead_nowhere():
    known = names.expand(names.BERT, 1)
    keys = {"embeddings.position_ids": "bert.embeddings.position_ids"}
    assert names.translate(keys, known, "x") == {}


def test_two_spellings_of_one_parameter_are_refused():
    keys = [
        "language_model.encoder.layers.0.attention.dense.bias",
        "language_model.encoder.layers.0.self_attention.dense.bias",
    ]
    with pytest.raises(CheckpointError, match="same parameter"):
        names.apply_aliases(keys, names.MEGATRON_ALIASES, "x")


def test_layer_counts():
    assert names.count_layers(["encoder.layer.11.output.dense.bias", "x"], "x") == 12
    assert names.count_layers(["language_model.encoder.layers.0.a"], "x") == 1
    assert names.count_layers(["pooler.dense.bias"], "x") == 0
    with pytest.raises(CheckpointError, match="1000000 layers"):
        names.count_layers(["encoder.layers.999999.a"], "x")


def test_shifting_layers():
    assert names.shift_layer("blocks.3.mlp.dense_in.bias", 12) == "blocks.15.mlp.dense_in.bias"
    assert names.shift_layer("final_norm.bias", 12) == "final_norm.bias"
