"""Pickles written by hand, put into one slot of a checkpoint that is valid otherwise."""

from __future__ import annotations

import argparse
import io
import struct
import zipfile
from pathlib import Path

import torch

from tests.checkpoint.tiny import random_model, write_megatron

MARKER = "payload payload payload"


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def look_up(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(name: str, *arguments: bytes) -> bytes:
    return look_up(name) + b"(" + b"".join(arguments) + b"tR"


def integer(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def put(index: int) -> bytes:
    """Remember the top of the stack, beside what torch itself remembers."""
    return b"r" + struct.pack("<I", 0xFFFF + index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", 0xFFFF + index)


def doubled_tuples(depth: int) -> bytes:
    """((..), (..)), both the same object: 2**depth when it is walked through."""
    return b")" + (put(0) + get(0) + b"\x86") * depth


def doubled_lists(depth: int) -> bytes:
    levels = range(1, depth)
    fill = b"".join(b"a" + get(i) + b"a" for i in reversed(levels))
    return b"]" + b"".join(b"]" + put(i) for i in levels) + fill


def doubled_dicts(depth: int) -> bytes:
    levels = range(1, depth)
    fill = b"".join(b"s" + text("b") + get(i) + b"s" for i in reversed(levels))
    return b"}" + b"".join(text("a") + b"}" + put(i) for i in levels) + fill


def _inside(slot: str, content: dict, value: object) -> None:
    if slot == "args":
        content["args"].hostile = value
    elif slot == "model key":
        content["model"][value] = torch.ones(1)
    elif slot == "model value":
        content["model"]["hostile"] = value
    elif slot == "lm_head value":
        content["model"]["lm_head"]["bias"] = value
    elif slot == "optimizer":
        content["optimizer"] = {"state": {0: {"exp_avg": torch.ones(2), "step": value}}}
    elif slot == "rng_state":
        content["rng_state"] = [{"random_rng_state": (3, (1, 2), value)}]
    elif slot == "top-level key":
        content[value] = 1
    else:
        content[slot] = value


SLOTS = (
    "args",
    "model key",
    "model value",
    "lm_head value",
    "optimizer",
    "rng_state",
    "top-level key",
    "checkpoint_version",
    "iteration",
    "lr_scheduler",
    "rerun_state_machine",
)


def write_with(folder: Path, payload: bytes, slot: str = "args", *, zipped: bool = True) -> Path:
    """A checkpoint with `payload`, instructions that push one object, in a slot; its file."""

    def edit(content, rank, stage):
        content["args"] = argparse.Namespace(**vars(content["args"]))
        _inside(slot, content, MARKER)

    root = write_megatron(folder, random_model(layers=1), args="default", edit=edit, zipped=zipped)
    file = next(root.rglob("*.pt"))
    file.write_bytes(replace_payload(file.read_bytes(), payload))
    return file


def replace_payload(raw: bytes, payload: bytes) -> bytes:
    """Put the instructions in place of the string that marks the slot."""
    marker = text(MARKER)
    if raw[:2] != b"PK":
        assert raw.count(marker) == 1
        return raw.replace(marker, payload)
    return edit_zip(raw, {"data.pkl": lambda pickle: pickle.replace(marker, payload)})


def edit_zip(raw: bytes, edits: dict, *, method: int = zipfile.ZIP_STORED) -> bytes:
    """Rewrite a torch zip file, with some of its records changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w", method) as new:
        for entry in old.infolist():
            content = old.read(entry)
            name = entry.filename.partition("/")[2]
            if name in edits:
                content = edits[name](content)
            if content is not None:
                new.writestr(entry.filename, content)
    return out.getvalue()
