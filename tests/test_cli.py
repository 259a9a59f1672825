"""The command: what it prints, and that every mistake is one line and status 2, nothing written."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train import tiny
from tpcore import checkpoint
from tpcore.cli import main

ROOT = Path(__file__).parent.parent
PYTHON = [sys.executable, "-m", "tpcore"]


def _environment(**variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return kept | {"PYTHONPATH": str(ROOT)} | variables


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tiny.write_checkpoint(tmp_path / "megatron")
    return tiny.write_inputs(tmp_path)


def _yaml(folder: Path, **values: Any) -> str:
    """A configuration file that starts from the two-rank Megatron directory."""
    values = {
        "model__language_model__lm_checkpoint": folder / "megatron",
        "model__language_model__config": None,
        "trainer__max_epochs": 1,
    } | values
    path = folder / "run.yaml"
    path.write_text("task: text_classification\n")
    from tpcore.train.read_config import load_config, save_config

    save_config(load_config(path, tiny.overrides(folder, **values)), path)
    return str(path)


# --- quick and light ----------------------------------------------------------------------------


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from tpcore.cli import main\n"
        "try: main(['finetune', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'omegaconf', 'rich', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], env=_environment(), check=True)


def test_import_and_help_in_units_of_a_calibrating_loop() -> None:
    """Processor seconds, which other programs change little."""

    def loop() -> None:
        sum(i * i for i in range(10**6))  # 47 ms on the processor of docs/performance.md

    def child(*arguments: str) -> Callable[[], None]:
        def run() -> None:
            subprocess.run(
                [sys.executable, *arguments],
                env=_environment(),
                check=True,
                stdout=subprocess.DEVNULL,
            )

        return run

    def seconds(work: Callable[[], None]) -> float:
        def spent() -> float:
            both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
            usage = [resource.getrusage(who) for who in both]
            return sum(u.ru_utime + u.ru_stime for u in usage)

        found = []
        for _ in range(5):
            start = spent()
            work()
            found.append(spent() - start)
        return min(found)

    unit = seconds(loop)
    assert seconds(child("-c", "import tpcore")) - seconds(child("-c", "pass")) < unit  # 50 ms
    assert seconds(child("-m", "tpcore", "--help")) < 6 * unit  # 300 ms


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("tpcore ")


def test_all_keys_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--help-config"]) == 0
    out = capsys.readouterr().out
    # A default that differs by task is listed for each, with the tasks.
    assert "model.optim.lr=5.0e-05\n    Peak learning rate. [text_classification, " in out
    assert "model.optim.lr=3.0e-05\n    Peak learning rate. [question_answering]\n" in out
    assert "model.optim.eps=1.0e-08\n    Added to the root of the second moment.\n" in out


# --- the commands, end to end -------------------------------------------------------------------


def _stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_finetune_evaluate_predict(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["finetune", _yaml(folder), "model.optim.lr=3e-3", "trainer.max_epochs=6"]) == 0
    out = capsys.readouterr().out
    assert "tiny: finished" in out
    assert "new, not in the file: head.classifier.weight" in out
    run = str(folder / "runs/tiny/v")

    data = folder / "validation.tsv"
    written = folder / "predictions.tsv"
    assert main(["evaluate", run, str(data), "--predictions", str(written)]) == 0
    out = capsys.readouterr().out
    assert "│ accuracy" in out
    assert "test_accuracy" not in out
    assert "precision" in out
    assert len(written.read_text().splitlines()) == 1 + 10

    assert main(["evaluate", str(folder / "runs"), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["file"] == str(data)
    assert 0.5 <= metrics["val_accuracy"] <= 1.0

    assert main(["predict", run, str(data)]) == 0
    from_file = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [line.split("\t")[1] for line in data.read_text().splitlines()]
    _stdin(monkeypatch, b"")
    assert main(["predict", run]) == 0
    assert capsys.readouterr().out == ""
    _stdin(monkeypatch, b"good\n\xff\xfe\n")
    assert main(["predict", run]) == 2
    assert "standard input, line 2: byte 0xff is not UTF-8" in _single_line(capsys)
    _stdin(monkeypatch, ("\n".join(texts) + "\n").encode())
    assert main(["predict", run]) == 0
    from_stdin = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [p["label"] for p in from_file] == [p["label"] for p in from_stdin]
    labels = [line.split("\t")[0] for line in data.read_text().splitlines()]
    right = sum(p["label"] == label for p, label in zip(from_file, labels, strict=True))
    assert right == round(metrics["val_accuracy"] * 10)

    assert main(["inspect", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "text_classification"
    assert main(["inspect", run]) == 0
    assert "tensor_model_parallel_size  1\n" in capsys.readouterr().out
    assert main(["convert", run, str(folder / "hf"), "--to", "huggingface"]) == 0
    assert checkpoint.inspect(folder / "hf").head == "sequence_classification"


def test_convert_and_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = str(folder / "megatron"), str(folder / "four")
    convert = ["convert", source, target, "--to", "megatron", "--tensor-parallel-size", "4"]
    assert main(convert) == 0
    assert "tensor-parallel size 4" in capsys.readouterr().out
    assert (folder / "four/release/mp_rank_03/model_optim_rng.pt").is_file()
    assert (folder / "four/vocab.txt").is_file()
    assert main(["inspect", target]) == 0
    assert "tensor-parallel size 4" in capsys.readouterr().out
    assert main(["inspect", target, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tensor_parallel_size"] == 4
    assert facts["config"]["hidden_size"] == 32
    assert main(convert) == 2
    assert "exists already" in _single_line(capsys)
    assert main([*convert, "--overwrite"]) == 0


def test_checkpoints_need_no_extra(folder: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('tokenizers', 'omegaconf', 'yaml', 'rich', 'sklearn', 'seqeval'):\n"
        "    sys.modules[name] = None\n"
        "from tpcore.cli import main\n"
        "assert main(['inspect', 'megatron']) == 0\n"
        "convert = ['convert', 'megatron', 'new', '--to', 'megatron', '--qkv-layout', 'v3']\n"
        "assert main(convert) == 0\n"
        "from tpcore import checkpoint\n"
        "checkpoint.load('new')\n"
        "sys.exit(main(['finetune', '--help-config']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment(), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "pip install '.[finetune]' in a checkout" in done.stderr.splitlines()[-1]


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for text in ("usable cores", "NCCL", "layer_norm on cpu", "reference", "tokenizers"):
        assert text in out
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    served = {(entry["op"], entry["device"]): entry for entry in facts["ops"]}
    entry = served["layer_norm", "cpu"]
    assert entry["backend"] in ("cpu", "reference")
    assert set(entry["not"]) == {"cuda", "triton", "cpu", "reference"} - {entry["backend"]}
    assert facts["native libraries"]["cpu"]["loaded"] == (entry["backend"] == "cpu")


def test_output_that_nobody_reads_is_no_error(folder: Path) -> None:
    inspect = f"{sys.executable} -m tpcore inspect {folder / 'megatron'}"
    command = f"{inspect} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], env=_environment(), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[0].startswith("path")
    assert done.stdout.splitlines()[-1] in ("0", "141")  # 0: it had all been written before


# --- mistakes -----------------------------------------------------------------------------------


def _single_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("tpcore: error: "), error
    assert error.count("\n") == 1, error
    return error


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def _longer_vocabulary(folder: Path) -> None:
    with (folder / "vocab.txt").open("a") as file:
        file.writelines(f"word{i}\n" for i in range(300))


MEGATRON = "megatron/release/mp_rank_01/model_optim_rng.pt"

# What is wrong, what is done to the folder, overrides, what the line says.
MISTAKES: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "misspelt key": (
        lambda folder: None,
        ["model.optm.lr=1e-4"],
        ["unknown key model.optm.lr", "did you mean model.optim.lr?"],
    ),
    "size that does not divide the heads": (
        lambda folder: None,
        ["--nproc-per-node", "3"],
        ["num_attention_heads=4", "size of 3", "use 1, 2 or 4"],
    ),
    "size that does not divide the ranks": (
        lambda folder: None,
        ["model.tensor_model_parallel_size=2"],
        ["model.tensor_model_parallel_size=2", "1 rank"],
    ),
    "missing checkpoint": (
        lambda folder: None,
        ["model.language_model.lm_checkpoint=nowhere"],
        ["'nowhere' does not exist"],
    ),
    "missing rank file": (
        lambda folder: (folder / MEGATRON).unlink(),
        [],
        ["mp_rank_01"],
    ),
    "truncated checkpoint": (
        lambda folder: _truncate(folder / MEGATRON),
        [],
        ["mp_rank_01", "truncated"],
    ),
    "vocabulary of another model": (
        _longer_vocabulary,
        [],
        ["vocab_size=329", "29 entries"],
    ),
    "vocabulary that padding would hide": (
        lambda folder: (folder / "vocab.txt").open("a").write("more\n"),
        [],
        ["vocab_size=30", "29 entries"],
    ),
    "missing vocabulary": (
        lambda folder: None,
        ["model.tokenizer.vocab_file=nowhere.txt"],
        ["nowhere.txt"],
    ),
    "unknown label": (
        lambda folder: (folder / "validation.tsv").write_text("pos\tgood\nneg\tbad\npoz\tfine\n"),
        [],
        ["validation.tsv:3", "'poz'", "'pos'"],
    ),
    "empty data file": (
        lambda folder: (folder / "train.tsv").write_text(""),
        [],
        ["train.tsv", "empty"],
    ),
    "missing data file": (
        lambda folder: None,
        ["model.validation_ds.file_path=nowhere.tsv"],
        ["nowhere.tsv"],
    ),
    "unwritable output": (
        lambda folder: None,
        ["exp_manager.exp_dir=FOLDER/vocab.txt/runs"],
        ["vocab.txt/runs", "cannot be written"],
    ),
    "too long sequences": (
        lambda folder: None,
        ["model.dataset.max_seq_length=64"],
        ["max_seq_length=64", "32 positions"],
    ),
    "warm-up beyond the end": (
        lambda folder: None,
        ["model.optim.sched.warmup_steps=99"],
        ["warmup_steps=99", "4 steps"],
    ),
    "contradiction to the checkpoint": (
        lambda folder: None,
        ["model.language_model.config={num_layers: 3}"],
        ["num_layers=3, but", "megatron has 2"],
    ),
    "unknown encoder key": (
        lambda folder: None,
        ["model.language_model.config={hiden_size: 3}"],
        ["hiden_size", "did you mean hidden_size?"],
    ),
    **{
        f"encoder with {bad}": (
            lambda folder: None,
            [
                "model.language_model.lm_checkpoint=null",
                "model.language_model.config={hidden_size: 32, num_layers: 1, "
                f"num_attention_heads: 4, max_position_embeddings: 32, {bad}}}",
                "model.tokenizer.vocab_file=FOLDER/vocab.txt",
            ],
            [expected],
        )
        for bad, expected in (
            ("layernorm_eps: a", "model.language_model.config: layernorm_eps='a'"),
            ("init_std: -1", "init_std=-1"),
            ("post_layernorm: maybe", "post_layernorm='maybe'"),
            ("add_pooler: false", "add_pooler=False"),
            ("intermediate_size: 1000000000", "intermediate_size=1000000000 is too large"),
        )
    },
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(
    what: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, arguments, expected = MISTAKES[what]
    config = _yaml(folder)
    spoil(folder)
    before = sorted(folder.rglob("*"))
    assert main(["finetune", config, *(a.replace("FOLDER", str(folder)) for a in arguments)]) == 2
    line = _single_line(capsys)
    for text in expected:
        assert text in line
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "nowhere does not exist"),
        (["predict", "."], "holds no finished run"),
        (["inspect", "nowhere"], "nowhere"),
        (["convert", "nowhere", "x", "--to", "megatron"], "nowhere"),
        (
            ["convert", "megatron", "x", "--to", "megatron", "--tensor-parallel-size", "3"],
            "use 1, 2",
        ),
        (["finetune", "nowhere.yaml"], "nowhere.yaml"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_of_the_other_commands(
    arguments: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    assert main(arguments) == 2
    assert message in _single_line(capsys)
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["finetune"],
        ["finetune", "a.yaml", "--nproc-per-node", "0"],
        ["finetune", "a.yaml", "--lr", "3"],
        ["convert", "a", "b"],
        ["inspect", "a", "b"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "--help" in _single_line(capsys)


def test_diverging_run_has_status_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diverge = ["model.optim.lr=1e30", "trainer.gradient_clip_val=null"]
    assert main(["finetune", _yaml(folder), *diverge]) == 1
    assert "at step 2" in _single_line(capsys)


def test_traceback_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--traceback", "inspect", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("tpcore: error: nowhere")


# --- several processes --------------------------------------------------------------------------


def test_finetune_starts_its_own_ranks(folder: Path) -> None:
    config = _yaml(folder, trainer__max_steps=2, model__tensor_model_parallel_size=2)
    command = [*PYTHON, "finetune", config, "--nproc-per-node", "2", "model.optim.lr=1e-4"]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    mesh = "2 tensor-parallel x 1 data-parallel rank(s) on cpu"
    assert done.stdout.count(mesh) == 1
    assert done.stdout.count("tiny: finished") == 1
    run = folder / "runs/tiny/v"
    ranks = sorted(path.name for path in (run / "checkpoints").glob("mp_rank_*"))
    assert ranks == ["mp_rank_00", "mp_rank_01"]
    assert "lr: 0.0001" in (run / "config.yaml").read_text()
    assert main(["evaluate", str(run)]) == 0


def _children(pid: int) -> list[int]:
    """The ranks of a launcher, oldest first."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return sorted(map(int, text.split()))


@pytest.fixture
def endless_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Two ranks in the middle of a training that ends only when it is told to."""
    endless = {"trainer__max_epochs": 100000, "trainer__val_check_interval": 4}
    command = [*PYTHON, "finetune", _yaml(folder, **endless), "--nproc-per-node", "2"]
    process = subprocess.Popen(
        command,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    last = folder / "runs/tiny/v/checkpoints/mp_rank_01/tiny-last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert last.exists()
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("to", ["group", "launcher"])
def test_interrupted_ranks_end_at_once(
    to: str, endless_run: subprocess.Popen[str], folder: Path
) -> None:
    ranks = _children(endless_run.pid)
    assert len(ranks) == 2
    (os.killpg if to == "group" else os.kill)(endless_run.pid, signal.SIGINT)
    _, errors = endless_run.communicate(timeout=15)  # they used to wait for half a minute
    assert endless_run.returncode == 130
    assert errors.splitlines() == ["tpcore: error: interrupted"]
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert not list(folder.rglob("*.tmp"))
    assert main(["evaluate", str(folder / "runs")]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_is_named_and_ends_the_others(endless_run: subprocess.Popen[str]) -> None:
    os.kill(_children(endless_run.pid)[1], signal.SIGKILL)
    _, errors = endless_run.communicate(timeout=30)
    assert endless_run.returncode == 137
    assert errors.splitlines() == ["tpcore: error: rank 1 was ended by SIGKILL; was memory short?"]


def test_under_torchrun_rank_0_prints_the_line_first(folder: Path) -> None:
    config = _yaml(folder, trainer__max_steps=2)
    (folder / MEGATRON).unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr"]
    command += ["127.0.0.1", "--nproc-per-node", "2", "-m", "tpcore", "finetune", config]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1  # torchrun's own status when a rank failed
    assert done.stderr.count("tpcore: error: ") == 1
    lines = [line for line in done.stderr.splitlines() if "OMP_NUM_THREADS" not in line]
    first = next(line for line in lines if line.strip("* "))
    assert first.startswith("tpcore: error: ")
    assert "mp_rank_01" in first
    assert "Traceback (most recent call last):\n" not in done.stderr.split("tpcore: error")[0]
    assert not (folder / "runs").exists()
