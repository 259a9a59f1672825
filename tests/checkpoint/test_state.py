"""The canonical state: accounting, vocabulary, sizes."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.checkpoint import tiny
from tpcore.checkpoint import CheckpointError
from tpcore.checkpoint import state as state_module
from tpcore.checkpoint.state import (
    HEADS,
    CanonicalState,
    Source,
    check_complete,
    check_tensor_parallel_size,
    check_vocabulary,
    find_head,
    resize_vocabulary,
    sizes_from_shapes,
)
from tpcore.checkpoint.stored import StoredTensor
from tpcore.models import heads
from tpcore.models.config import BertConfig


def _stored(tensor):
    return StoredTensor(tuple(tensor.shape), tensor.dtype, partial(lambda t: t, tensor))


def _state(tensors, **changes):
    config = BertConfig(
        vocab_size=tiny.ROWS,
        hidden_size=tiny.HIDDEN,
        num_layers=tiny.LAYERS,
        num_attention_heads=tiny.HEADS,
        intermediate_size=tiny.FEED_FORWARD,
        max_position_embeddings=tiny.POSITIONS,
    )
    stored = {name: _stored(t) for name, t in tensors.items()}
    return CanonicalState(
        config=config.replace(**changes),
        head="pretraining",
        head_kwargs={"binary": True},
        tensors=stored,
        source=Source(path=Path("file"), format="test"),
    )


def test_known_heads_are_those_of_the_models():
    assert set(HEADS) == set(heads.HEADS)


def test_a_complete_state_passes_in_the_order_of_the_model():
    model = tiny.random_model()
    backwards = dict(reversed(model.items()))
    checked = check_complete(_state(backwards))
    assert set(checked.tensors) == set(model)
    assert next(iter(checked.tensors)) == "embeddings.word_embeddings.weight"
    in_blocks = [name for name in checked.tensors if name.startswith("blocks.")]
    assert in_blocks == sorted(in_blocks, key=lambda name: int(name.split(".")[1]))


# Word embeddings are looked at before all others, for the number of rows; see the sizes below.
@pytest.mark.parametrize(
    "name", sorted(tiny.random_model(layers=1).keys() - {"embeddings.word_embeddings.weight"})
)
def test_every_missing_parameter_is_an_error_that_names_it(name):
    model = tiny.random_model(layers=1)
    del model[name]
    with pytest.raises(CheckpointError, match="file: missing parameters") as error:
        check_complete(_state(model, num_layers=1))
    assert name in str(error.value)


def test_left_over_parameters_are_an_error():
    model = tiny.random_model()
    with pytest.raises(CheckpointError, match=r"blocks\.3\.input_norm\.weight.*num_layers=3"):
        check_complete(_state(model, num_layers=3))


@pytest.mark.parametrize("name", ["blocks.1.attention.qkv.weight", "final_norm.bias"])
def test_a_wrong_shape_is_an_error(name):
    model = tiny.random_model()
    model[name] = model[name][:-1]
    with pytest.raises(CheckpointError, match=rf"{name} has shape .* expected"):
        check_complete(_state(model))


def test_a_wrong_dtype_is_an_error():
    model = tiny.random_model()
    model["final_norm.bias"] = model["final_norm.bias"].long()
    with pytest.raises(CheckpointError, match=r"final_norm\.bias has dtype torch\.int64"):
        check_complete(_state(model))


def test_vocabulary_grows_by_its_last_row_and_shrinks_by_cutting():
    table = torch.arange(6.0).reshape(3, 2)
    grown = resize_vocabulary(table, 5)
    assert torch.equal(grown[:3], table)
    assert torch.equal(grown[3:], table[-1:].expand(2, 2))
    assert torch.equal(resize_vocabulary(grown, 3), table)
    bias = torch.tensor([1.0, 2.0])
    assert resize_vocabulary(bias, 4).tolist() == [1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("vocab_size", "rows"), [(30522, 30522), (30522, 30592), (30522, 30720), (28996, 29696)]
)
def test_plausible_vocabularies(vocab_size, rows):
    check_vocabulary(vocab_size, rows, "file")


@pytest.mark.parametrize(
    ("vocab_size", "rows", "cause"),
    [(28996, 30592, "uncased"), (30522, 29056, "cased"), (28996, 30720, "uncased"), (10, 999, "")],
)
def test_vocabularies_of_another_model(vocab_size, rows, cause):
    with pytest.raises(CheckpointError, match=f"vocab_size={vocab_size}.*{rows} rows.*{cause}"):
        check_vocabulary(vocab_size, rows, "file")


@pytest.mark.parametrize("vocab_size", [5, 28, 30, 128])
def test_a_file_that_states_its_vocabulary_takes_no_other(vocab_size):
    check_vocabulary(29, 128, "file", 29)
    check_vocabulary(100, 128, "file", 128)  # as many as rows: padding may be counted
    with pytest.raises(CheckpointError, match=f"vocab_size={vocab_size}.* has 29 entries"):
        check_vocabulary(vocab_size, 128, "file", 29)


def test_heads_from_names():
    assert find_head(["final_norm.bias"]) is None
    assert find_head(["head.lm.bias", "head.binary.bias"]) == "pretraining"
    assert find_head(["head.lm.bias"]) == "pretraining"
    assert find_head(["head.classifier.bias"]) == "sequence_classification"
    assert find_head(["head.outputs.bias"]) == "question_answering"
    assert find_head(["head.binary.bias"]) == "binary"
    assert find_head(["head.classifier.bias", "head.lm.bias"]) == "classifier+lm"


def test_sizes_that_cannot_be():
    shapes = {name: tuple(t.shape) for name, t in tiny.random_model().items()}
    assert sizes_from_shapes(shapes, 4, "file")["num_token_types"] == 2
    with pytest.raises(CheckpointError, match="no transformer layers"):
        sizes_from_shapes(shapes, 0, "file")
    with pytest.raises(CheckpointError, match="expected a matrix"):
        sizes_from_shapes({**shapes, "embeddings.position_embeddings.weight": (3,)}, 4, "file")
    del shapes["embeddings.token_type_embeddings.weight"]
    assert sizes_from_shapes(shapes, 4, "file")["num_token_types"] == 0
    del shapes["embeddings.word_embeddings.weight"]
    with pytest.raises(CheckpointError, match="word_embeddings"):
        sizes_from_shapes(shapes, 4, "file")


def test_tensor_parallel_sizes_that_do_not_divide():
    config = BertConfig(vocab_size=8, hidden_size=12, num_attention_heads=6, intermediate_size=16)
    check_tensor_parallel_size(config, 2)
    with pytest.raises(CheckpointError, match=r"num_attention_heads=6.*use 1, 2, 3 or 6"):
        check_tensor_parallel_size(config, 4)
    with pytest.raises(CheckpointError, match="intermediate_size=16"):
        check_tensor_parallel_size(config, 3)
    with pytest.raises(CheckpointError, match="not a positive integer"):
        check_tensor_parallel_size(config, 0)


def test_a_copy_that_differs_is_an_error_until_the_head_is_dropped():
    model = tiny.random_model()
    name = "embeddings.word_embeddings.weight"
    other = model[name] + 1
    state = dataclasses.replace(_state(model), copies={name: _stored(other)})
    with pytest.raises(CheckpointError, match="not tied"):
        state.full(name)
    assert torch.equal(state.without_head().full(name), model[name])
    equal = dataclasses.replace(state, copies={name: _stored(model[name].clone())})
    assert torch.equal(equal.full(name), model[name])


def test_shards_own_their_memory():
    model = tiny.random_model()
    state = _state(model)
    for name in model:
        piece = state.shard(name, 1, 2, tiny.ROWS)
        assert piece.is_contiguous()
        assert piece.untyped_storage().nbytes() == piece.numel() * piece.element_size()
    assert state_module.sharding_of("blocks.3.mlp.dense_out.weight").dim == 1
