"""Megatron-LM directories: whatever is missing, left over or not what it should be is refused."""

import re
import shutil

import pytest
import torch

from tests.checkpoint import tiny
from tests.checkpoint.tiny import edit_models
from tpcore.checkpoint import CheckpointError
from tpcore.checkpoint.formats import megatron

MODEL = tiny.random_model()


KEYS = sorted(
    tiny.rank_model(
        tiny.random_model(layers=1),
        version=3,
        spelling="new",
        rank=0,
        tp=1,
        layers=range(1),
        first=True,
        last=True,
    )
)


@pytest.mark.parametrize("key", KEYS)
def test_a_deleted_and_a_renamed_key_always_fail(tmp_path, key):
    model = tiny.random_model(layers=1)

    def write(name, change):
        return tiny.write_megatron(tmp_path / name, model, nested=False, edit=edit_models(change))

    with pytest.raises(CheckpointError, match="missing parameters"):
        megatron.read(write("deleted", lambda flat: flat.pop(key)))

    def rename(flat):
        flat[f"{key}_"] = flat.pop(key)

    with pytest.raises(CheckpointError, match=re.escape(f"{key}_")):
        megatron.read(write("renamed", rename))


@pytest.mark.parametrize("key", ["extra", "lm_head.extra.weight", "language_model.encoder.x"])
def test_an_extra_key_always_fails(tmp_path, key):
    edit = edit_models(lambda flat: flat.update({key: torch.zeros(1)}))
    root = tiny.write_megatron(tmp_path, MODEL, nested=False, edit=edit)
    with pytest.raises(CheckpointError, match=f"unknown parameters: {re.escape(key)}"):
        megatron.read(root)


def test_a_layer_that_is_missing_in_the_middle(tmp_path):
    def drop(flat):
        for key in [key for key in flat if ".layers.2." in key]:
            del flat[key]

    root = tiny.write_megatron(tmp_path, MODEL, nested=False, edit=edit_models(drop))
    with pytest.raises(CheckpointError, match=r"missing parameters: blocks\.2\.input_norm"):
        megatron.read(root)


def test_ranks_that_do_not_belong_together(tmp_path):
    other = tiny.random_model(seed=1)
    root = tiny.write_megatron(tmp_path / "a", MODEL, tp=2)
    foreign = tiny.write_megatron(tmp_path / "b", other, tp=2)
    place = "iter_0000010/mp_rank_01/model_optim_rng.pt"
    shutil.copy(foreign / place, root / place)
    state = megatron.read(root)
    with pytest.raises(CheckpointError, match=r"final_norm\.bias should be the same on every rank"):
        state.full("final_norm.bias")

    def drop(content, rank, stage):
        if rank == 1:
            del content["model"]["binary_head"]

    with pytest.raises(CheckpointError, match=r"head\.binary"):
        megatron.read(tiny.write_megatron(tmp_path / "c", MODEL, tp=2, edit=drop))

    def widen(content, rank, stage):
        if rank == 1:
            head = content["model"]["lm_head"]
            head["bias"] = head["bias"].repeat(2)

    with pytest.raises(CheckpointError, match=r"head\.lm\.bias is \[128\].*\[256\].*on rank 1"):
        megatron.read(tiny.write_megatron(tmp_path / "d", MODEL, tp=2, edit=widen))


def test_an_untied_decoder_is_refused_with_its_head(tmp_path):
    def edit(content, rank, stage):
        if stage == 1:
            content["model"]["word_embeddings_for_head"]["weight"] += 1

    state = megatron.read(tiny.write_megatron(tmp_path, MODEL, pp=2, tp=2, edit=edit))
    with pytest.raises(CheckpointError, match="tied"):
        state.full("embeddings.word_embeddings.weight")


# --- files that are missing or not what they should be -------------------------------------------


def test_a_missing_rank_is_named(tmp_path):
    root = tiny.write_megatron(tmp_path, MODEL, tp=4)
    folder = root / "iter_0000010"
    shutil.rmtree(folder / "mp_rank_02")
    with pytest.raises(CheckpointError, match=r"missing: .*mp_rank_02/model_optim_rng\.pt$"):
        megatron.read(root)
    shutil.rmtree(folder / "mp_rank_03")
    with pytest.raises(CheckpointError, match=r"written by 4 tensor-parallel ranks, but 2 .* are"):
        megatron.read(root)
    with pytest.raises(CheckpointError, match="written by 4 tensor-parallel ranks, but 1"):
        megatron.read(folder / "mp_rank_00")


def test_a_missing_stage_is_named(tmp_path):
    root = tiny.write_megatron(tmp_path, MODEL, tp=2, pp=2)
    (root / "iter_0000010" / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match=r"missing: .*mp_rank_01_000/model_optim_rng\.pt$"):
        megatron.read(root)


@pytest.mark.parametrize("word", ["", "ten", "-1", "iter_0000010", "1" * 40])
def test_a_tracker_that_says_nothing(tmp_path, word):
    root = tiny.write_megatron(tmp_path, MODEL)
    (root / "latest_checkpointed_iteration.txt").write_text(word)
    with pytest.raises(CheckpointError, match=r"latest_checkpointed_iteration\.txt: .*neither"):
        megatron.read(root)


def test_a_tracker_that_names_what_is_not_there(tmp_path):
    root = tiny.write_megatron(tmp_path, MODEL)
    (root / "latest_checkpointed_iteration.txt").write_text("20\n")
    with pytest.raises(CheckpointError, match=r"names iteration 20, but .*iter_0000020 is missing"):
        megatron.read(root)


def test_a_missing_tracker_is_an_error_that_offers_what_is_there(tmp_path):
    root = tiny.write_megatron(tmp_path, MODEL)
    (root / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match=r"pass .*iter_0000010"):
        megatron.read(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({"state_dict": {}}, "no 'model' in it; it holds: state_dict"),
        ({}, "it holds: nothing"),
        ({"model": [1]}, "model is a list"),
        ({"model": {"lm_head": {"bias": 3}}, "args": 7}, "args is a int"),
        ({"model": {"lm_head": {"bias": 3}}}, r"lm_head\.bias is a int, not a tensor"),
        ({"model": {1: torch.ones(1)}}, "no string"),
        ({"model": {"lm_head": {"bias": torch.ones(3)}}}, "no transformer layers"),
        ({"model": {}}, "no transformer layers"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, message):
    file = tmp_path / "MegatronBERT.pt"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=message) as error:
        megatron.read(file)
    assert str(file) in str(error.value)


def test_models_that_contain_themselves(tmp_path):
    tree: dict = {"a": torch.ones(1)}
    tree["again"] = tree
    torch.save({"model": tree}, tmp_path / "MegatronBERT.pt")
    with pytest.raises(CheckpointError, match="contains itself"):
        megatron.read(tmp_path)


def test_tensors_that_are_not_dense(tmp_path):
    flat = {"lm_head.bias": torch.ones(4).to_sparse()}
    torch.save({"model": flat}, tmp_path / "MegatronBERT.pt")
    with pytest.raises(CheckpointError, match="_rebuild_sparse_tensor"):
        megatron.read(tmp_path)


def test_shapes_beyond_the_file(tmp_path):
    flat = {"lm_head.bias": torch.ones(1).expand(2**40)}
    torch.save({"model": flat}, tmp_path / "MegatronBERT.pt")
    with pytest.raises(CheckpointError, match="claims shape"):
        megatron.read(tmp_path)


def test_more_ranks_than_there_were(tmp_path):
    root = tiny.write_megatron(tmp_path / "a", MODEL, tp=2)
    more = tiny.write_megatron(tmp_path / "b", MODEL, tp=4)
    shutil.copytree(more / "iter_0000010/mp_rank_02", root / "iter_0000010/mp_rank_02")
    with pytest.raises(CheckpointError, match=r"by 2 .* 3 .* are there; .*take them away"):
        megatron.read(root)


def test_files_that_were_swapped_or_come_from_two_checkpoints(tmp_path):
    def by(**facts):
        def edit(content, rank, stage):
            for name, value in facts.items():
                setattr(content["args"], name, value(rank))

        return edit

    root = tiny.write_megatron(tmp_path / "a", MODEL, tp=2, edit=by(rank=lambda rank: 8 + rank))
    first, second = sorted((root / "iter_0000010").iterdir())
    tiny.assert_reads_as(root, MODEL)
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    with pytest.raises(
        CheckpointError, match=r"mp_rank_00.*written by process 9.*rename them back"
    ):
        megatron.read(root)
    # A converter writes all of them in one process.
    tiny.assert_reads_as(
        tiny.write_megatron(tmp_path / "b", MODEL, tp=2, edit=by(rank=lambda rank: 0)), MODEL
    )
    for name, what in (("checkpoint_version", 2.0), ("iteration", 11)):

        def other(content, rank, stage, name=name, what=what):
            if rank == 1:
                content[name] = what

        root = tiny.write_megatron(tmp_path / name, MODEL, tp=2, edit=other)
        with pytest.raises(CheckpointError, match=rf"mp_rank_01.* has {name}=.*.*mp_rank_00.*diff"):
            megatron.read(root)
