"""The migration page: every new import works, and the one-line command does what it says."""

import re
import subprocess
from pathlib import Path

import pytest

import tpcore.interop.megatron as flat

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
ROWS = re.findall(r"^\| `((?:from|import) [^`]*)` \| `([^`]*)` \|$", PAGE, re.MULTILINE)


def test_the_table_is_there():
    assert len(ROWS) > 20


@pytest.mark.parametrize("statement", sorted({new for _, new in ROWS}))
def test_every_new_import_works(statement):
    exec(statement, {})


def test_the_command_turns_the_old_imports_into_the_new(tmp_path):
    (command,) = re.findall(r"^sed .*$", PAGE, re.MULTILINE)
    moved = [
        (old, new)
        for old, new in ROWS
        if old.startswith(("from megatron.core", "from apex.")) and "..." not in old
    ]
    # Two on one line, and a name that only begins like one of them.
    moved.append(
        (
            "import megatron.core.utils, megatron.core.enums, megatron.corelib",
            "import tpcore.interop.megatron.utils, tpcore.interop.megatron.enums, megatron.corelib",
        )
    )
    file = tmp_path / "your_model.py"
    file.write_text("".join(f"{old}\n" for old, _ in moved))
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert file.read_text().splitlines() == [new for _, new in moved]


def test_everything_is_there_flat():
    assert sorted(set(flat.__all__)) == flat.__all__
    for module in (flat.parallel_state, flat.tensor_parallel):
        names = getattr(module, "__all__", [n for n in vars(module) if n.startswith("get_")])
        for name in names:
            assert getattr(flat, name) is getattr(module, name)


def test_the_names_of_tpcore_exist():
    for module, name in re.findall(r"`tpcore\.(layers|parallel|kernels)\.(\w+)", PAGE):
        assert hasattr(__import__(f"tpcore.{module}", fromlist=[name]), name), name
