"""Names of released encoders, and downloads from a server that does what servers do."""

import contextlib
import hashlib
import http.server
import os
import re
import socket
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoint.tiny import random_model, write_megatron
from tpcore import checkpoint
from tpcore.checkpoint import CheckpointError, registry
from tpcore.checkpoint.download import download
from tpcore.cli import main
from tpcore.models.config import BertConfig
from tpcore.tokenizer import SHIPPED
from tpcore.train.config import LanguageModelConfig, ModelConfig, TokenizerConfig
from tpcore.train.prepare import checkpoint_path, find_tokenizer

pytest.importorskip("pooch")
CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FAST = {"attempts": 3, "timeout_s": 0.5, "wait_s": 0.01}


class _Handler(http.server.BaseHTTPRequestHandler):
    """Does to each request what the next entry of server.plan says; serves it well after that."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        plan = server.plan.pop(0) if server.plan else "whole"
        content = server.content
        if isinstance(plan, int):
            self.send_response(plan)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = 0
        if match and server.tag and self.headers.get("If-Range") == server.tag:
            start = int(match.group(1))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.tag:
            self.send_header("ETag", server.tag)
        if plan == "page":
            self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        half = content[start : start + (len(content) - start) // 2]
        self.close_connection = True
        if plan == "truncate":
            self.wfile.write(half)
        elif plan == "stall":
            self.wfile.write(half)
            self.wfile.flush()
            server.release.wait(5)
        elif plan == "reset":
            self.wfile.write(half)
            self.wfile.flush()
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        else:
            self.wfile.write(content[start:])


@pytest.fixture
def server():
    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass

    with Server(("127.0.0.1", 0), _Handler) as running:
        running.plan, running.requests = [], []
        running.content, running.tag = CONTENT, '"first"'
        running.release = threading.Event()
        running.url = f"http://127.0.0.1:{running.server_port}/files/weights.pt"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.release.set()
        running.shutdown()


def _leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


@pytest.mark.parametrize("fault", ["truncate", "stall", "reset"])
def test_an_interrupted_download_goes_on_where_it_was(server, tmp_path, fault):
    server.plan = [fault]
    target = tmp_path / "weights.pt"
    download(server.url, target, sha256=SHA256, **FAST)
    assert target.read_bytes() == CONTENT
    assert "Range" not in server.requests[0]
    resumed = int(server.requests[1]["Range"][6:-1])
    assert 0 < resumed <= len(CONTENT) // 2
    assert _leftovers(tmp_path) == ["weights.pt"]


def test_a_later_process_goes_on_too(server, tmp_path):
    server.plan = ["truncate"]
    target = tmp_path / "weights.pt"
    with pytest.raises(CheckpointError, match="the connection ends too early"):
        download(server.url, target, **{**FAST, "attempts": 1})
    assert not target.exists()
    download(server.url, target, **FAST)
    assert target.read_bytes() == CONTENT
    assert "Range" in server.requests[1]


@pytest.mark.parametrize("tag", ['"second"', None])
def test_two_versions_of_a_file_are_never_joined(server, tmp_path, tag):
    server.plan = ["truncate"]
    target = tmp_path / "weights.pt"
    with pytest.raises(CheckpointError):
        download(server.url, target, **{**FAST, "attempts": 1})
    server.content, server.tag = CONTENT[::-1], tag
    download(server.url, target, **FAST)
    assert target.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("status", [500, 503, 429, 416])
def test_passing_troubles_of_a_server_are_waited_for(server, tmp_path, status):
    server.plan = [status, status]
    download(server.url, tmp_path / "weights.pt", **FAST)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("plan", "said", "num_requests"),
    [
        ([404], "404 Not Found", 1),
        ([403], "403 Forbidden", 1),
        (["page"], "web page", 1),
        ([503] * 3, "503 Service Unavailable", 3),
        (["truncate"] * 3, "the connection ends too early", 3),
        (["reset"] * 3, "the connection", 3),
    ],
)
def test_what_cannot_be_had_is_one_line_and_no_file(server, tmp_path, plan, said, num_requests):
    server.plan = plan
    with pytest.raises(CheckpointError, match=said) as error:
        download(server.url, tmp_path / "weights.pt", **FAST)
    assert server.url in str(error.value)
    assert "\n" not in str(error.value)
    assert len(server.requests) == num_requests
    assert not (tmp_path / "weights.pt").exists()


def test_a_server_that_stalls_for_good(server, tmp_path):
    server.plan, server.content = ["stall"] * 3, CONTENT[:100]
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match="does not answer in time"):
        download(server.url, tmp_path / "weights.pt", **{**FAST, "timeout_s": 0.2})
    assert time.monotonic() - begin < 4


def test_another_digest(server, tmp_path):
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(CheckpointError, match=f"another SHA-256 digest than the {SHA256}"):
        download(server.url, tmp_path / "weights.pt", sha256=SHA256, **FAST)
    assert _leftovers(tmp_path) == []


def test_nobody_listens(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/weights.pt"
        with pytest.raises(CheckpointError, match="refused"):
            download(url, tmp_path / "weights.pt", **FAST)


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        download(server.url, tmp_path / "taken" / "weights.pt", **FAST)


def test_processes_that_ask_together_download_once(server, tmp_path):
    target = tmp_path / "weights.pt"
    threads = [
        threading.Thread(target=download, args=(server.url, target), kwargs=FAST) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 1


# --- names ---------------------------------------------------------------------------------------

NAME = "megatron-bert-345m-uncased"


@pytest.fixture
def released(server, tmp_path, monkeypatch):
    """The name stands for a tiny checkpoint on the server."""
    written = write_megatron(tmp_path / "origin", random_model(), iteration=None)
    server.content = next(written.rglob("*.pt")).read_bytes()
    release = replace(
        registry.RELEASES[NAME],
        checkpoint_url=server.url,
        config=BertConfig(vocab_size=250, hidden_size=16, num_attention_heads=4, num_layers=4),
    )
    monkeypatch.setitem(registry.RELEASES, NAME, release)
    monkeypatch.setenv(registry.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return server


def test_a_name_loads_and_is_kept(released, tmp_path):
    model = checkpoint.load(NAME)
    assert model.config.vocab_size == 250
    assert model.config.hidden_size == 16
    again = checkpoint.load(NAME)
    assert len(released.requests) == 1
    assert (tmp_path / "cache" / NAME / "weights.pt").is_file()
    assert again.config == model.config


def test_a_local_file_wins(released, tmp_path):
    write_megatron(tmp_path / NAME, random_model(layers=2))
    assert checkpoint.inspect(NAME).config.num_layers == 2
    assert released.requests == []


def test_a_file_put_into_the_cache_wins(released, tmp_path):
    folder = tmp_path / "cache" / NAME
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(released.content)
    assert checkpoint.inspect(NAME).config.num_layers == 4
    assert released.requests == []


def test_a_digest_that_the_user_pinned(released, tmp_path):
    folder = tmp_path / "cache" / NAME
    folder.mkdir(parents=True)
    pin = folder / "weights.pt.sha256"
    for text, message in (("0" * 64, "another SHA-256 digest"), ("abc", "64 hex digits")):
        pin.write_text(f"{text}  weights.pt\n")
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(NAME)
        assert not (folder / "weights.pt").exists()
    pin.write_text(f"{hashlib.sha256(released.content).hexdigest()}  weights.pt\n")
    assert checkpoint.load(NAME).config.hidden_size == 16


def test_the_commands_take_names(released, tmp_path, capsys):
    assert main(["inspect", NAME]) == 0
    assert "Megatron-LM" in capsys.readouterr().out
    assert main(["convert", NAME, "out", "--to", "huggingface"]) == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert len(released.requests) == 1


def test_without_a_network_the_error_says_which_file_to_put_where(released, tmp_path, capsys):
    released.plan = [404]
    assert main(["inspect", NAME]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert NAME in error
    assert f"put it at {tmp_path / 'cache' / NAME / 'weights.pt'}" in error
    assert registry.CACHE_VARIABLE in error


@pytest.mark.parametrize("name", ["megatron-bert-uncased", "megatron-bert-cased"])
def test_families_have_no_file(name):
    with pytest.raises(CheckpointError, match="pass the path of yours, and its configuration"):
        checkpoint.load(name)


def test_a_slip_in_a_name():
    with pytest.raises(CheckpointError, match=f"did you mean the name {NAME}"):
        checkpoint.load("megatron-bert-345-uncased")


def test_the_trainer_takes_names(released, tmp_path):
    language_model = LanguageModelConfig(pretrained_model_name=NAME)
    path = checkpoint_path(ModelConfig(language_model=language_model))
    assert path == tmp_path / "cache" / NAME / "weights.pt"
    tokenizer = find_tokenizer(ModelConfig(language_model=language_model), path)
    assert (tokenizer.vocab_size, tokenizer.lowercase) == (30522, True)


@pytest.mark.parametrize(("case", "rows"), [("uncased", 30522), ("cased", 28996)])
def test_a_tokenizer_without_a_vocabulary_file(case, rows):
    settings = TokenizerConfig(tokenizer_name=f"megatron-bert-{case}")
    tokenizer = find_tokenizer(ModelConfig(tokenizer=settings), None)
    assert (tokenizer.vocab_size, tokenizer.lowercase) == (rows, case == "uncased")


def test_a_vocabulary_beside_the_checkpoint_wins(released, tmp_path):
    language_model = LanguageModelConfig(pretrained_model_name=NAME)
    path = checkpoint_path(ModelConfig(language_model=language_model))
    vocabulary = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "mine")
    path.with_name("vocab.txt").write_text("\n".join(vocabulary))
    found = find_tokenizer(ModelConfig(language_model=language_model), path)
    assert found.vocabulary == vocabulary


def test_a_model_with_a_vocabulary_of_its_own_brings_it(server, tmp_path, monkeypatch):
    name = "biomegatron-bert-345m-cased"
    url = server.url.replace("weights.pt", "vocab.txt")
    release = replace(registry.RELEASES[name], vocabulary_url=url)
    monkeypatch.setitem(registry.RELEASES, name, release)
    monkeypatch.setenv(registry.CACHE_VARIABLE, str(tmp_path))
    server.content = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nGene\n"
    model = ModelConfig(language_model=LanguageModelConfig(pretrained_model_name=name))
    assert find_tokenizer(model, None).vocabulary[-1] == "Gene"
    assert (tmp_path / name / "vocab.txt").read_bytes() == server.content


def test_every_name_is_complete():
    assert len(registry.RELEASES) == 6
    for name, release in registry.RELEASES.items():
        assert release.lowercase == name.endswith("-uncased")
        assert (release.checkpoint_url is None) == (release.config is None)
        assert (release.vocabulary in SHIPPED) != (release.vocabulary_url is not None)
        for url in (release.checkpoint_url, release.vocabulary_url):
            assert url is None or url.startswith("https://")
        if release.config is not None:
            assert release.config.vocab_size == (30522 if release.lowercase else 28996)


def test_the_cache_is_in_the_home_folder(monkeypatch):
    monkeypatch.delenv(registry.CACHE_VARIABLE, raising=False)
    with contextlib.suppress(KeyError):
        assert registry.cache_folder() == Path(os.environ["HOME"]) / ".cache" / "tpcore"
