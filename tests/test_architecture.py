"""Rules of the house that no linter knows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ("tpcore", "csrc", "benchmarks", "tests", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
]


def test_native_code_outside_csrc_torch_knows_no_torch():
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        if path.is_relative_to(ROOT / "csrc") and not path.is_relative_to(ROOT / "csrc/torch")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.match(r'\s*#\s*include\s*[<"](torch|ATen|c10|pybind|Python)', line)
    ]
    assert not found


def test_files_stay_readable():
    long = {
        str(path.relative_to(ROOT)): count
        for path in SOURCES
        if not path.is_relative_to(ROOT / "tests")
        and (count := len(path.read_text().splitlines())) > 500
    }
    assert not long, f"split these files of more than 500 lines: {long}"


def test_sources_are_ascii():
    # Tests of the tokenizer spell out other scripts; code and comments need none.
    other = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if not path.is_relative_to(ROOT / "tests") and not path.read_text().isascii()
    ]
    assert not other


@pytest.mark.parametrize("module", ["triton", "transformers", "lightning", "sklearn", "rich"])
def test_importing_tpcore_is_light(module):
    code = f"import sys, tpcore; assert {module!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_catch_all_modules():
    # Drop-in modules lie where those lie whose names they have.
    foreign = ROOT / "tpcore" / "interop" / "megatron"
    names = {
        path.stem
        for path in SOURCES
        if path.is_relative_to(ROOT / "tpcore") and not path.is_relative_to(foreign)
    }
    assert not names & {"utils", "util", "common", "helpers", "misc", "base"}
