"""The code blocks of a page, and how they are run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    flags=re.DOTALL | re.MULTILINE,
)


class Snippet(NamedTuple):
    language: str  # "" for a block without one
    code: str
    not_run: str | None  # the reason in the comment above it


def snippets(page: str) -> list[Snippet]:
    """The python and shell blocks of a page of the repository, in order."""
    found = [
        Snippet(match["language"], match["code"], match["reason"])
        for match in _BLOCK.finditer((ROOT / page).read_text())
    ]
    known = {"python", "bash", "yaml", "math", "text", ""}
    assert {language for language, _, _ in found} <= known, page
    return [one for one in found if one.language in ("python", "bash")]


def run(language: str, code: str, folder: Path) -> str:
    """Run a block in a folder, with the interpreter of the tests; returns what it prints."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TPCORE_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_together(blocks: list[str], folder: Path) -> None:
    """Run python blocks one after the other in one process, each with names of its own."""
    run("python", f"for code in {blocks!r}:\n    exec(compile(code, code, 'exec'), {{}})", folder)


def link_examples(folder: Path, messages: int) -> None:
    """`examples/` for a working folder, with so many messages, half of them spam."""
    examples = folder / "examples"
    (examples / "sms_spam").mkdir(parents=True)
    for name in ("sms_spam.yaml", "prepare_sms_spam.py"):  # a copy: it looks beside itself
        (examples / name).write_bytes((ROOT / "examples" / name).read_bytes())
    source = ROOT / "examples" / "sms_spam" / "SMSSpamCollection.tsv"
    lines = source.read_text(encoding="utf-8").split("\n")
    kept = [
        line
        for label in ("ham\t", "spam\t")
        for line in [line for line in lines if line.startswith(label)][: messages // 2]
    ]
    target = examples / "sms_spam" / source.name
    target.write_text("\n".join(kept) + "\n", encoding="utf-8")
