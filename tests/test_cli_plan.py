"""tpcore plan: its table is the cost model's, and it asks for the speeds that it needs."""

from __future__ import annotations

import pytest

from tests.train import tiny
from tpcore import checkpoint
from tpcore.cli import main
from tpcore.models import cost

DEVICE = ["--matrix-tflops", "1", "--copy-gb-per-s", "100", "--memory-gib", "0.001"]


@pytest.fixture
def model(tmp_path):
    tiny.write_checkpoint(tmp_path / "megatron")
    return str(tmp_path / "megatron")


def test_table(model, capsys):
    link = ["--link-gb-per-s", "10"]
    assert main(["plan", model, "--ranks", "1,2", "--tokens", "512", *DEVICE, *link]) == 0
    header, *rows = capsys.readouterr().out.splitlines()[2:7]
    assert header.split()[:4] == ["ranks", "tp", "dp", "sp"]
    splits = ["1 1 1 no", "2 1 2 no", "2 2 1 no", "2 2 1 yes"]
    assert [row.split()[:4] for row in rows] == [split.split() for split in splits]
    device = cost.Device(
        matrix_flops_per_s=1e12, copy_bytes_per_s=1e11, memory_bytes=2**20, link_bytes_per_s=1e10
    )
    config = checkpoint.inspect(model).config
    for row, (tp, dp, sp) in zip(rows, ((1, 1, 0), (1, 2, 0), (2, 1, 0), (2, 1, 1)), strict=True):
        layout = cost.Layout(
            tokens=512,
            mean_keys=128,
            tensor_parallel_size=tp,
            data_parallel_size=dp,
            sequence_parallel=bool(sp),
        )
        time = cost.step_time(config, layout, device).total_s
        assert row.split()[4:6] == [f"{1e3 * time:.1f}", f"{512 * dp / time:.0f}"]
        fits = cost.memory_of_rank(config, layout).total <= 2**20
        assert row.endswith("does not fit") != fits


def test_names_the_fastest_split_that_fits(model, capsys):
    link = ["--link-gb-per-s", "10", "--network-gb-per-s", "1", "--sequence-parallel", "off"]

    def last_lines(memory_gib):
        memory = [*DEVICE[:-1], memory_gib]
        assert main(["plan", model, "--ranks", "1,4096", *memory, *link]) == 0
        return capsys.readouterr().out.splitlines()[-2:]

    one, many = last_lines("1")
    assert one.startswith("1 rank: tp 1, dp 1 is the fastest that fits, ")
    assert many.startswith("4096 ranks: tp 1, dp 4096 is the fastest that fits, ")
    # Between what a rank needs whole and as one of four: only the larger splits are left.
    config = checkpoint.inspect(model).config
    sizes = [
        cost.memory_of_rank(
            config, cost.Layout(tokens=4096, mean_keys=128, tensor_parallel_size=tp)
        ).total
        for tp in (1, 4)
    ]
    one, many = last_lines(str(sum(sizes) / 2 / 2**30))
    assert one == f"1 rank: nothing fits; a rank needs {sizes[0] / 2**30:.2f} GiB at least"
    assert "tp 1" not in many
    assert "is the fastest that fits" in many


def test_measures_what_is_not_given(model, capsys):
    assert main(["plan", model, "--ranks", "1", "--precision", "32"]) == 0
    assert "GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "2"], "--ranks 2 needs --link-gb-per-s"),
        (["--ranks", "9", "--link-gb-per-s", "1"], "needs --network-gb-per-s"),
        (["--ranks", "0"], "'0' is not a positive number"),
        (["--link-gb-per-s", "fast"], "'fast' is not a positive number"),
    ],
)
def test_refused(model, arguments, message, capsys):
    try:
        status = main(["plan", model, *DEVICE, *arguments])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
