"""Everything that the description allows: padding with all else, and every key of every container.

The quick tests take two paddings with every layout and split; the slow one the full product.
"""

import itertools
import re

import pytest
import torch

from tests.checkpoint import test_core, test_nemo, tiny
from tpcore.checkpoint import CheckpointError
from tpcore.checkpoint.io import _read
from tpcore.checkpoint.state import resize_vocabulary
from tpcore.models.config import padded_vocab_size_for

TRUE_ROWS = 250
DIVISORS = (1, 8, 128, 512)
"""make_vocab_size_divisible_by; 1 pads no more than the ranks need: not at all at 1 and 2."""
LAYOUTS = [
    (version, spelling, nested)
    for version, spelling in [(0, "old"), *itertools.product((1, 2, 3), tiny.SPELLINGS)]
    for nested in (True, False)
]
SPLITS = list(itertools.product((1, 2, 4), (1, 2, 4)))
LAYER = re.compile(r"\.layers\.\d+\.")


def _assert_padded(path, version, spelling, nested, tp, pp, divisor):
    rows = padded_vocab_size_for(TRUE_ROWS, tp, divisor)
    model = tiny.random_model(rows=rows)
    args = tiny.args_of(
        version,
        tp,
        pp,
        padded_vocab_size=rows,
        vocab_size=TRUE_ROWS,
        make_vocab_size_divisible_by=divisor,
    )
    options = {"version": version, "spelling": spelling, "nested": nested, "tp": tp, "pp": pp}
    state = tiny.assert_reads_as(
        tiny.write_megatron(path, model, args=args, **options), model, qkv_layout=None
    )
    assert (state.config.vocab_size, state.config.padded_vocab_size) == (TRUE_ROWS, rows)
    # What ranks of other sizes get: the true rows, and then the last one of them or of the file.
    for size in (1, 2, 4):
        wanted = state.padded_rows(size)
        for name in ("embeddings.word_embeddings.weight", "head.lm.bias"):
            parts = [state.shard(name, rank, size, wanted) for rank in range(size)]
            assert torch.equal(torch.cat(parts), resize_vocabulary(model[name], wanted)), name


def test_the_paddings_differ():
    sizes = {(tp, d): padded_vocab_size_for(TRUE_ROWS, tp, d) for tp in (1, 2, 4) for d in DIVISORS}
    assert sizes[1, 1] == sizes[2, 1] == TRUE_ROWS
    assert set(sizes.values()) == {250, 252, 256, 512, 1024, 2048}


@pytest.mark.parametrize("divisor", [1, 128])
def test_every_padding_with_every_layout_and_with_every_split(tmp_path, divisor):
    number = DIVISORS.index(divisor)
    for n, layout in enumerate(LAYOUTS):
        split = SPLITS[(2 * n + number) % len(SPLITS)]
        _assert_padded(tmp_path / f"layout-{n}", *layout, *split, divisor)
    for n, split in enumerate(SPLITS):
        layout = LAYOUTS[(3 * n + number) % len(LAYOUTS)]
        _assert_padded(tmp_path / f"split-{n}", *layout, *split, divisor)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "spelling", "nested"), LAYOUTS)
def test_the_full_product(tmp_path, version, spelling, nested):
    for (tp, pp), divisor in itertools.product(SPLITS, DIVISORS):
        place = tmp_path / f"{tp}-{pp}-{divisor}"
        _assert_padded(place, version, spelling, nested, tp, pp, divisor)


# --- every key, in every container ---------------------------------------------------------------


def _first_layer(keys):
    """Keys without a layer, and those of layer 0: the others differ in the number only."""
    return [key for key in keys if ".layers." not in key or ".layers.0." in key]


def _assert_refused(write, keys, twins=lambda key: [key]):
    """`write(name, edit)` makes a checkpoint; `twins(key)`: what is stored together with a key."""
    _read(write("whole", lambda flat: None), None, {})
    for number, key in enumerate(keys):

        def delete(flat, key=key):
            for twin in twins(key):
                del flat[twin]

        def rename(flat, key=key):
            for twin in twins(key):
                flat[f"{twin}_"] = flat.pop(twin)

        def add(flat, key=key):
            for twin in twins(key):
                flat[f"{twin}_extra"] = torch.zeros_like(flat[twin])

        for edit in (delete, rename, add):
            path = write(f"{edit.__name__}-{number}", edit)
            with pytest.raises(CheckpointError) as caught:
                _read(path, None, {})
            # Prefixes go, and stacked layers have no number; the end of a name stays as it was.
            end = ".".join(key.split(".")[-2:])
            words = "missing parameters" if edit is delete else re.escape(f"{end}_")
            assert re.search(words, str(caught.value)), (key, edit.__name__, caught.value)


def _core_keys():
    flat = tiny.rank_model(
        test_core.MODEL,
        version=3,
        spelling="new",
        rank=0,
        tp=1,
        layers=range(tiny.LAYERS),
        first=True,
        last=True,
    )
    return list(test_core.core_names(flat, fused=True))


@pytest.mark.parametrize("stacked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_key_of_torch_dist(tmp_path, stacked):
    def twins(key):
        if not stacked or not LAYER.search(key):
            return [key]
        return [LAYER.sub(f".layers.{n}.", key) for n in range(tiny.LAYERS)]

    def write(name, edit):
        return test_core.write_dist(tmp_path / name, stacked=stacked, edit=edit)

    _assert_refused(write, _first_layer(_core_keys()), twins)


def test_every_key_of_a_nemo_file(tmp_path):
    config = test_nemo.NODES["token_classification"]
    content = {**test_nemo.encoder(), **test_nemo.classifier()}

    def write(name, edit):
        state = dict(content)
        edit(state)
        return test_nemo.write_nemo(
            tmp_path / f"{name}.nemo", [state], config=config, encoder_config=test_nemo.ENCODER
        )

    _assert_refused(write, _first_layer(content))


def test_every_key_of_a_lightning_file(tmp_path):
    node = test_nemo.NODES["token_classification"]
    hyper = {"cfg": {"language_model": {"config": test_nemo.ENCODER}, **node}}
    content = {**test_nemo.encoder(), **test_nemo.classifier()}

    def write(name, edit):
        state = dict(content)
        edit(state)
        path = tmp_path / f"{name}.ckpt"
        facts = {"state_dict": state, "hyper_parameters": hyper, "checkpoint_version": 3.0}
        torch.save(facts, path)
        return path

    _assert_refused(write, _first_layer(content))
