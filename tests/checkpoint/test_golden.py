"""Recorded checkpoints of the real implementations give the recorded outputs, at every size."""

import pytest
import torch

from tests.checkpoint import golden
from tests.helpers.ranks import run_ranks
from tpcore import checkpoint

COMMITTED = golden.committed()
SHARED = golden.shared()


def _load(item, **options):
    return checkpoint.load(item.checkpoint, device=torch.get_default_device(), **options)


def _outputs(model, inputs):
    with torch.no_grad():
        return model.eval()(inputs["tokens"], inputs["padding_mask"], inputs["types"])


def _check_reproduced(tp, folders):
    for folder in folders:
        item = golden.Golden(folder)
        model = _load(item, tp=tp)
        golden.assert_reproduced(item, _outputs(model, item.inputs()))


def _check_tanh(tp, folder):
    item = golden.Golden(folder)
    model = _load(item, tp=tp, gelu="tanh")
    golden.assert_reproduced(item, _outputs(model, item.inputs()), prefix="tanh_gelu.")


def test_the_collection_is_complete():
    assert len(COMMITTED) >= 10
    assert {item.name for item in COMMITTED} >= {"v1.0_tp1", "ckptv1.0_tp2", "hf_bert_pretraining"}
    assert {item.name for item in COMMITTED} >= {"nemo_tp2_v3", "mcore0.16.1_dist_tp2"}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_committed(size):
    run_ranks(_check_reproduced, size, [item.folder for item in COMMITTED])


@pytest.mark.skipif(not SHARED, reason="the larger collection (../shared/fixtures) is not here")
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shared(size):
    run_ranks(_check_reproduced, size, [item.folder for item in SHARED])


@pytest.mark.parametrize(
    "name", ["ckptv1.0_tp2", "v2.0_tp2", "v2.5_L2postln_tp1", "v2.5_onnxsafe_tp1"]
)
def test_tanh_gelu_by_override(name):
    run_ranks(_check_tanh, 2, golden.COMMITTED / name)


@pytest.mark.parametrize("name", ["v1.0_tp1", "ckptv1.0_tp2", "v2.5_L2postln_tp1"])
def test_losses_are_the_recorded_ones(name):
    item = golden.Golden(golden.COMMITTED / name)
    inputs, expected = item.inputs(), item.expected()
    labels = inputs["labels"].masked_fill(inputs["loss_mask"] == 0, -100)
    model = _load(item).eval()
    arguments = (inputs["tokens"], inputs["padding_mask"], inputs["types"])
    with torch.no_grad():
        lm = model(*arguments, labels=labels).loss
        both = model(*arguments, labels=(labels, inputs["is_random"])).loss
    assert lm.item() == pytest.approx(expected["lm_loss"].item(), abs=1e-5)
    binary = (both - lm).item()
    assert binary == pytest.approx(expected["binary_loss"].item(), abs=1e-5)


def _labels(inputs):
    return inputs["labels"].masked_fill(inputs["loss_mask"] == 0, -100)


def _check_losses_over_padding(tp, folders):
    num_padded = 0
    for folder in folders:
        item = golden.Golden(folder)
        expected = item.expected()
        if "lm_loss" not in expected or "true_vocab" not in expected:
            continue
        inputs, true = item.inputs(), expected["true_vocab"].item()
        if expected["padded_vocab"].item() == true:
            continue
        num_padded += 1
        arguments = (inputs["tokens"], inputs["padding_mask"], inputs["types"])
        losses = {}
        for flag in (True, False):
            model = _load(item, tp=tp, vocab_size=true, loss_over_padding=flag).eval()
            assert model.config.padded_vocab_size == expected["padded_vocab"]
            with torch.no_grad():
                losses[flag] = model(*arguments, labels=_labels(inputs)).loss.item()
        allowed = 1e-2 if "fp16" in item.name else 2e-5
        recorded = expected["lm_loss"].item()
        assert losses[True] == pytest.approx(recorded, abs=allowed), item.name
        assert losses[False] < recorded - allowed, item.name
    assert num_padded >= 4


@pytest.mark.parametrize("size", [1, 2, 4])
def test_losses_over_the_padded_vocabulary_are_megatrons(size):
    """With the true size of the vocabulary known, a flag keeps the padded columns in the loss."""
    folders = [item.folder for item in (*COMMITTED, *SHARED)]
    run_ranks(_check_losses_over_padding, size, folders)


def test_the_flag_is_written_and_read_again(tmp_path):
    item = golden.Golden(golden.COMMITTED / "v2.0_tp2")
    options = {"vocab_size": 1000, "loss_over_padding": True}
    for format in ("megatron", "megatron-core", "nemo"):
        checkpoint.convert(item.checkpoint, tmp_path / format, to=format, **options)
        config = checkpoint.inspect(tmp_path / format).config
        assert (config.vocab_size, config.loss_over_padding) == (1000, True)
    assert not checkpoint.inspect(item.checkpoint).config.loss_over_padding


def test_hidden_states_differ_where_only_the_rows_of_qkv_are_misread():
    """The comparison above would notice a wrong row order."""
    item = golden.Golden(golden.COMMITTED / "ckptv1.0_tp2")
    model = _load(item, qkv_layout="v3")
    assert golden.errors_against(item, _outputs(model, item.inputs()))["hidden"] > 0.1
