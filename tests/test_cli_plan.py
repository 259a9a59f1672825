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
    header, *rows = capsys.readouterr().out.splitlines()[2:]
    assert header.split()[:3] == ["ranks", "tp", "dp"]
    assert [row.split()[:3] for row in rows] == [["1"] * 3, ["2", "1", "2"], ["2", "2", "1"]]
    device = cost.Device(
        matrix_flops_per_s=1e12, copy_bytes_per_s=1e11, memory_bytes=2**20, link_bytes_per_s=1e10
    )
    config = checkpoint.inspect(model).config
    for row, (tp, dp) in zip(rows, ((1, 1), (1, 2), (2, 1)), strict=True):
        layout = cost.Layout(
            tokens=512, mean_keys=128, tensor_parallel_size=tp, data_parallel_size=dp
        )
        time = cost.step_time(config, layout, device).total_s
        assert row.split()[3:5] == [f"{1e3 * time:.1f}", f"{512 * dp / time:.0f}"]
        fits = cost.memory_of_rank(config, layout).total <= 2**20
        assert row.endswith("does not fit") != fits


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
