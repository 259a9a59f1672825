"""Megatron-LM directories that are written: by the description, bit-equal at every size."""

import itertools

import pytest
import torch

from tests.checkpoint import golden, tiny
from tests.checkpoint.tiny import assert_reads_as, edit_models
from tpcore.checkpoint import CheckpointError, convert
from tpcore.checkpoint.formats import megatron
from tpcore.checkpoint.untrusted.unpickle import load_pickle

MODEL = tiny.random_model()


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_written_directory_is_what_the_description_says(tmp_path, tp):
    """Against the keys, shapes, nesting and args of tiny.py, which knows nothing of the tables."""
    source = tiny.write_megatron(tmp_path / "source", MODEL, version=1, spelling="old", tp=2)
    convert(source, tmp_path / "out", to="megatron", tensor_parallel_size=tp)
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "10"
    rows = -(-tiny.ROWS // (128 * tp)) * 128 * tp
    model = dict(MODEL)
    for name in ("embeddings.word_embeddings.weight", "head.lm.bias"):
        last = model[name][-1:]
        model[name] = torch.cat([model[name], *[last] * (rows - tiny.ROWS)])
    for rank in range(tp):
        file = tmp_path / f"out/iter_0000010/mp_rank_{rank:02d}/model_optim_rng.pt"
        content = load_pickle(file)
        assert content["checkpoint_version"] == 3.0
        assert content["iteration"] == 10
        expected = tiny.nest(
            tiny.rank_model(
                model,
                version=3,
                spelling="new",
                rank=rank,
                tp=tp,
                layers=range(tiny.LAYERS),
                first=True,
                last=True,
            )
        )
        _assert_same_tree(content["model"], expected)
        args = vars(content["args"])
        for name, value in vars(tiny.args_of(3, tp, padded_vocab_size=rows)).items():
            assert args[name] == value or (args[name] in (None, False) and not value), name
        # What Megatron-LM compares on load when a vocabulary file is given.
        for name in ("make_vocab_size_divisible_by", "padded_vocab_size", "tokenizer_type"):
            assert name in args
        # No shard drags the full tensor's memory into its file.
        assert file.stat().st_size < 2 * sum(t.numel() * 4 for t in model.values()) / tp + 2**15


def _assert_same_tree(tree, expected):
    assert tree.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            _assert_same_tree(tree[key], value)
        else:
            assert torch.equal(tree[key], value), key


def test_round_trips_between_sizes_are_bit_equal(tmp_path):
    """1 -> 2 -> 4 -> 1, with a vocabulary whose padding differs at each of them."""
    model = tiny.random_model(rows=1152)
    args = tiny.args_of(3, 1, padded_vocab_size=1152)
    path = tiny.write_megatron(tmp_path / "start", model, args=args)
    first = megatron.read(path)
    rows = []
    for step, tp in enumerate((2, 4, 1)):
        info = convert(path, tmp_path / str(step), to="megatron", tensor_parallel_size=tp)
        rows.append(info.vocab_rows)
        path = tmp_path / str(step)
    assert rows == [1280, 1536, 1152]
    last = assert_reads_as(path, model)
    assert last.config == first.config


@pytest.mark.parametrize("name", [item.name for item in golden.committed()])
def test_real_files_survive_round_trips(tmp_path, name):
    from tpcore.checkpoint.io import _read

    path = golden.Golden(golden.COMMITTED / name).checkpoint
    first = _read(path, None, {})
    for step, tp in enumerate((1, 2, 4, 1)):
        convert(path, tmp_path / str(step), to="megatron", tensor_parallel_size=tp)
        path = tmp_path / str(step)
    last = _read(path, None, {})
    rows = first.config.vocab_size
    assert last.config.replace(padded_vocab_size=None) == first.config.replace(
        padded_vocab_size=None
    )
    assert (last.head, dict(last.head_kwargs)) == (first.head, dict(first.head_kwargs))
    assert last.labels == first.labels
    for tensor in first.tensors:
        assert torch.equal(last.full(tensor, rows), first.full(tensor, rows)), tensor


def test_sizes_that_do_not_divide_write_nothing(tmp_path):
    root = tiny.write_megatron(tmp_path / "a", MODEL)
    with pytest.raises(CheckpointError, match=r"num_attention_heads=4 .* use 1, 2 or 4"):
        convert(root, tmp_path / "b", to="megatron", tensor_parallel_size=3)
    assert [child.name for child in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("gelu", "lm_head_gelu"),
    list(itertools.product(("none", "tanh", "erf_1.41421"), repeat=2)),
)
def test_every_pair_of_gelus_is_written_and_read_back(tmp_path, gelu, lm_head_gelu):
    root = tiny.write_megatron(tmp_path / "a", MODEL)
    overrides = {"gelu": gelu, "lm_head_gelu": lm_head_gelu}
    info = convert(root, tmp_path / "b", to="megatron", **overrides)
    assert (info.config.gelu, info.config.lm_head_gelu) == (gelu, lm_head_gelu)


def test_a_head_that_has_no_name_in_tpcore_is_rewritten_but_not_converted(tmp_path):
    def choose(model):
        for key in [key for key in model if key.startswith(("lm_head", "binary_head"))]:
            del model[key]
        model["multichoice_head.weight"] = torch.ones(1, tiny.HIDDEN)
        model["multichoice_head.bias"] = torch.ones(1)

    edit = edit_models(choose)
    root = tiny.write_megatron(tmp_path / "a", MODEL, nested=False, edit=edit)
    assert convert(root, tmp_path / "b", to="megatron").head == "multichoice"
    with pytest.raises(CheckpointError, match=r"head \(multichoice\) cannot be written"):
        convert(root, tmp_path / "c", to="huggingface")
