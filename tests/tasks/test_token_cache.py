"""Tokens kept in a file: as without one, and made again when what they depend on changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tasks import tiny_data
from tests.train import tiny
from tpcore.tasks import token_cache
from tpcore.tasks.token_cache import cache_key, cached_tokens, encode_texts
from tpcore.tokenizer import WordPieceTokenizer
from tpcore.train.prepare import prepare
from tpcore.train.read_config import load_config

TOKENIZER = WordPieceTokenizer(tiny.VOCABULARY)
TEXTS = ["the good day, goods", "", "x", "the nicely book " * 40]


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tokens-*.safetensors"))


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.json"
    path.write_text("anything")
    return path


def test_what_is_read_is_what_was_encoded(data, monkeypatch):
    expected = encode_texts(TOKENIZER, TEXTS)
    whole = TOKENIZER.encode_batch(TEXTS)
    assert [t.ids for t in expected] == [e.ids[1:-1] for e in whole]
    assert [t.offsets for t in expected] == [e.offsets[1:-1] for e in whole]
    first, note = cached_tokens(TOKENIZER, TEXTS, data)
    (path,) = _files(data.parent)
    assert (first, note) == (expected, f"tokens written to {path}")
    monkeypatch.setattr(token_cache, "encode_texts", None)  # not called again
    assert cached_tokens(TOKENIZER, TEXTS, data) == (expected, f"tokens read from {path}")
    assert [p.name for p in data.parent.iterdir() if p.name.startswith(".")] == []


def test_everything_that_tokens_depend_on_is_in_the_key(monkeypatch):
    same = WordPieceTokenizer(tiny.VOCABULARY)
    assert cache_key(TOKENIZER, TEXTS) == cache_key(same, list(TEXTS))
    keys = {cache_key(TOKENIZER, TEXTS)}
    for tokenizer, texts in (
        (TOKENIZER, [*TEXTS[:-1], TEXTS[-1] + "."]),
        (TOKENIZER, [TEXTS[0] + TEXTS[1], *TEXTS[2:]]),
        (TOKENIZER, TEXTS[::-1]),
        (WordPieceTokenizer((*tiny.VOCABULARY, "goods")), TEXTS),
        (WordPieceTokenizer((*tiny.VOCABULARY[:-2], "##ly", "##s")), TEXTS),
        (TOKENIZER.with_whole_tokens(["day"]), TEXTS),
        (WordPieceTokenizer((*tiny.VOCABULARY, "Good")), TEXTS),
    ):
        keys.add(cache_key(tokenizer, texts))
    monkeypatch.setattr("tokenizers.__version__", "0")
    keys.add(cache_key(TOKENIZER, TEXTS))
    assert len(keys) == 9


def _damage(path: Path, kind: str) -> None:
    arrays = load_file(path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif kind == "no such format":
        path.write_bytes(b"text")
    elif kind == "other texts":
        save_file(arrays, path, {"key": "0"})
    else:
        key = cache_key(TOKENIZER, TEXTS)
        name, at, value = {
            "id": ("ids", 0, len(tiny.VOCABULARY)),
            "offset": ("offsets", (0, 1), 1000),
            "end": ("ends", 0, 1000),
        }[kind]
        arrays[name][at] = value
        save_file(arrays, path, {"key": key})


@pytest.mark.parametrize("kind", ["cut", "no such format", "other texts", "id", "offset", "end"])
def test_a_damaged_file_is_made_again(data, kind):
    expected, _ = cached_tokens(TOKENIZER, TEXTS, data)
    (path,) = _files(data.parent)
    good = path.read_bytes()
    _damage(path, kind)
    found, note = cached_tokens(TOKENIZER, TEXTS, data)
    assert found == expected
    assert note.startswith(f"tokens written to {path}, since it ")
    assert path.read_bytes() == good


def test_a_folder_that_cannot_be_written_to_is_no_error(data, monkeypatch):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    found, note = cached_tokens(TOKENIZER, TEXTS, data)
    assert found == encode_texts(TOKENIZER, TEXTS)
    assert "tokens are not kept: " in note
    assert "Permission denied" in note


def test_a_bar_of_many_texts_on_a_terminal_of_the_first_rank(monkeypatch, capsys):
    monkeypatch.setattr(token_cache, "SHOWN_FROM", 1000)
    texts = ["the day"] * 1001
    expected = encode_texts(TOKENIZER, texts)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("RANK", "1")
    assert encode_texts(TOKENIZER, texts, "train.json") == expected
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert encode_texts(TOKENIZER, texts, "train.json") == expected
    assert "train.json: tokens of texts" in capsys.readouterr().err


def test_use_cache_of_question_answering(tmp_path):
    arguments = tiny_data.overrides("question_answering", tmp_path)
    plain = prepare(load_config(None, arguments))
    assert not _files(tmp_path)
    arguments.append("model.dataset.use_cache=true")
    made = prepare(load_config(None, arguments))
    files = _files(tmp_path)
    assert [path.name.split(".tokens-")[0] for path in files] == ["train.json", "validation.json"]
    again = prepare(load_config(None, arguments))
    assert any("tokens read from" in note for note in again.notes)
    assert list(made.train.examples) == list(again.train.examples) == list(plain.train.examples)
    # Settings of windows are applied to what is read; other data have another file.
    other = prepare(load_config(None, [*arguments, "model.dataset.doc_stride=4"]))
    assert len(other.train.examples) > len(plain.train.examples)
    assert _files(tmp_path) == files
    content = json.loads((tmp_path / "train.json").read_text())
    content["data"][0]["paragraphs"][0]["qas"][0]["question"] = "the food"
    (tmp_path / "train.json").write_text(json.dumps(content))
    changed = prepare(load_config(None, arguments))
    assert len(_files(tmp_path)) == 3
    assert list(changed.train.examples) != list(plain.train.examples)
    assert "use_cache" not in plain.task.to_config()
    assert torch.equal(load_file(files[0])["ends"], load_file(files[0])["ends"].sort().values)
