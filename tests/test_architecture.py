"""Rules of the house that no linter knows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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


# What takes a second to load, and what nobody who imports a layer has asked for.
_HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "triton",
    "sympy",
    "scipy",
    "sklearn",
    "seqeval",
    "transformers",
    "lightning",
    "tensorboard",
    "matplotlib",
)


def _loaded_by(statement: str, after: str = "pass") -> set[str]:
    code = (
        f"import sys\n{after}\nbefore = set(sys.modules)\n{statement}\n"
        "print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_importing_tpcore_loads_one_module():
    # Exactly: argument parsing, --version and the tokenizer stand on it, without torch.
    assert _loaded_by("import tpcore", after="import importlib, typing") == {"tpcore"}


def test_every_public_name_loads_nothing_heavy_beyond_torch():
    statement = "import tpcore\nfor name in tpcore.__all__: getattr(tpcore, name)"
    loaded = _loaded_by(statement, after="import torch, torch.distributed")
    assert {"tpcore.layers", "tpcore.train.run", "tpcore.checkpoint"} <= loaded
    assert not loaded & set(_HEAVY)


def test_the_help_of_every_command_loads_neither_torch_nor_an_extra():
    commands = ("finetune", "evaluate", "predict", "convert", "inspect", "plan", "doctor")
    statement = (
        "from tpcore.cli import main\n"
        f"for command in ([], *{[[name] for name in commands]}):\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0"
    )
    loaded = _loaded_by(statement)
    assert {"argparse", "tpcore.cli.doctor"} <= loaded
    assert not loaded & {"torch", "numpy", "omegaconf", "yaml", "rich", "tokenizers", *_HEAVY}


def test_no_catch_all_modules():
    # Drop-in modules lie where those lie whose names they have.
    foreign = ROOT / "tpcore" / "interop" / "megatron"
    names = {
        path.stem
        for path in SOURCES
        if path.is_relative_to(ROOT / "tpcore") and not path.is_relative_to(foreign)
    }
    assert not names & {"utils", "util", "common", "helpers", "misc", "base"}
