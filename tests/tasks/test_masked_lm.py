"""Masked language modelling: what is masked, what is learnt, and that neither depends on ranks."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_mesh
from tests.train import tiny
from tpcore import checkpoint, load_run
from tpcore.cli import main
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.tasks import DataError, MaskedLM
from tpcore.tasks.passages import Masking, Passage, read_passages
from tpcore.tokenizer import WordPieceTokenizer
from tpcore.train.faults import StoppedError
from tpcore.train.finetune import finetune
from tpcore.train.launch import on_all_ranks
from tpcore.train.logging import RunLog
from tpcore.train.prepare import build_model, prepare
from tpcore.train.run import export_run
from tpcore.train.run_state import choose_run
from tpcore.train.trainer import Trainer

SINGLE = (TensorParallelGroup.single(), DataParallelGroup.single())
WORDS = (*tiny.GOOD, *tiny.OTHER)


def _write_text(path: Path, num_documents: int, seed: int = 0) -> Path:
    """Each document is one word again and again: what is masked stands beside the mask."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(num_documents):
        word = WORDS[int(torch.randint(len(WORDS), (1,), generator=generator))]
        lines += [*[" ".join([word] * 6)] * 4, ""]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.write_vocabulary(tmp_path / "vocab.txt")
    _write_text(tmp_path / "train.txt", 8)
    _write_text(tmp_path / "validation.txt", 4, seed=1)
    return tmp_path


def _overrides(folder: Path, **values: Any) -> list[str]:
    settings = {
        "task": "masked_lm",
        "model__train_ds__file_path": folder / "train.txt",
        "model__validation_ds__file_path": folder / "validation.txt",
        "model__dataset__sentence_loss": "order",
    }
    return tiny.overrides(folder, **(settings | values))


def _config(folder: Path, **values: Any) -> Any:
    from tpcore.train.read_config import load_config

    return load_config(None, _overrides(folder, **values))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> WordPieceTokenizer:
    return WordPieceTokenizer.from_vocab_file(
        tiny.write_vocabulary(tmp_path_factory.mktemp("v") / "vocab.txt")
    )


# --- what is masked -----------------------------------------------------------------------------


def test_masks_are_15_percent_in_three_kinds(tokenizer: WordPieceTokenizer) -> None:
    ordinary = [i for i, t in enumerate(tokenizer.vocabulary) if not t.startswith("[")]
    sentence = tuple(ordinary[i % len(ordinary)] for i in range(100))
    masking, kinds, replaced = Masking(tokenizer), Counter[str](), Counter[int]()
    places: Counter[int] = Counter()
    for seed in range(2000):
        example = masking.example([Passage(1, 0, (sentence,))], 0, seed)
        original = [tokenizer.cls_id, *sentence, tokenizer.sep_id]
        positions, targets, label = example.labels
        assert len(positions) == 15
        assert label == -100
        assert list(targets) == [original[p] for p in positions]
        places.update(positions)
        for position, token in enumerate(example.input_ids):
            if position not in positions:
                assert token == original[position]
            elif token == tokenizer.mask_id:
                kinds["mask"] += 1
            elif token == original[position]:
                kinds["kept"] += 1
            else:
                kinds["random"] += 1
                replaced[token] += 1
    count = sum(kinds.values())
    # A random token is the one that stood there once in len(ordinary).
    same = 0.1 / len(ordinary)
    for kind, expected in (("mask", 0.8), ("random", 0.1 - same), ("kept", 0.1 + same)):
        deviation = math.sqrt(expected * (1 - expected) / count)
        assert abs(kinds[kind] / count - expected) < 4 * deviation, (kind, kinds)
    assert set(replaced) == set(ordinary)
    assert set(places) == set(range(1, 101))
    assert max(places.values()) < 300 + 5 * math.sqrt(300)
    assert min(places.values()) > 300 - 5 * math.sqrt(300)


def test_whole_words_are_masked_together(tokenizer: WordPieceTokenizer) -> None:
    ids = tuple(tokenizer.encode("goodsly day lovelys film was goods the bookly").ids[1:-1])
    words: list[list[int]] = []
    for position, token in enumerate(ids, start=1):
        if tokenizer.vocabulary[token].startswith("##"):
            words[-1].append(position)
        else:
            words.append([position])
    assert [len(word) for word in words] == [3, 1, 2, 1, 1, 2, 1, 2]

    def num_split(whole: bool) -> int:
        masking, count = Masking(tokenizer, probability=0.3, whole_words=whole), 0
        for seed in range(100):
            chosen = set(masking.example([Passage(1, 0, (ids,))], 0, seed).labels.positions)
            assert 1 <= len(chosen) <= 4
            count += any(0 < len(chosen & set(word)) < len(word) for word in words)
        return count

    assert num_split(whole=True) == 0
    assert num_split(whole=False) > 50


def test_masks_follow_seed_epoch_and_place_alone(folder: Path) -> None:
    config = _config(folder)
    job = prepare(config)
    task = job.task
    assert isinstance(task, MaskedLM)

    def inputs(seed: int, epoch: int) -> list[Any]:
        return [tuple(e.input_ids) for e in task.examples_at(job.train, seed, epoch)]

    assert inputs(1, 0) == inputs(1, 0)
    assert inputs(1, 0) != inputs(1, 1)
    assert inputs(1, 0) != inputs(2, 0)
    # One example alone is the one among all: nothing is drawn in turn.
    assert tuple(task.examples_at(job.train, 1, 3)[5].input_ids) == inputs(1, 3)[5]
    again = task.load(folder / "train.txt")
    assert [tuple(e.input_ids) for e in again.examples] == [
        tuple(e.input_ids) for e in job.train.examples
    ]


@pytest.mark.parametrize("kind", ["order", "next"])
def test_sentence_pairs(kind: str, tokenizer: WordPieceTokenizer) -> None:
    def passage(document: int, words: list[str]) -> Passage:
        return Passage(1, document, tuple(tuple(tokenizer.encode(w).ids[1:-1]) for w in words))

    passages = [passage(0, ["the", "film", "was"]), passage(1, ["good", "day"]), passage(2, ["it"])]
    masking = Masking(tokenizer, sentence_loss=kind)
    labels: Counter[int] = Counter()
    for seed in range(400):
        example = masking.example(passages, 0, seed)
        ids = list(example.input_ids)
        for position, target in zip(*example.labels[:2], strict=True):
            ids[position] = target
        text = " ".join(tokenizer.vocabulary[i] for i in ids)
        labels[example.labels.sentence] += 1
        middle = ids.index(tokenizer.sep_id) + 1
        assert list(example.type_ids) == [0] * middle + [1] * (len(ids) - middle)
        whole = {"[CLS] the [SEP] film was [SEP]", "[CLS] the film [SEP] was [SEP]"}
        if example.labels.sentence == 0:
            assert text in whole
        elif kind == "order":
            assert text in {"[CLS] film was [SEP] the [SEP]", "[CLS] was [SEP] the film [SEP]"}
        else:
            assert text.split("[SEP]")[1].split()[0] in {"good", "day", "it"}
    assert abs(labels[0] - 200) < 4 * 10
    assert labels[0] + labels[1] == 400
    single = masking.example(passages, 2, 0)
    assert single.labels.sentence == -100
    assert set(single.type_ids) == {0}


# --- files --------------------------------------------------------------------------------------


def test_documents_become_passages(tmp_path: Path, tokenizer: WordPieceTokenizer) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the day\nwas good\n\n[SEP]\n\nit is a very fine book\r\nfilm\n \t\nfood\n")
    passages, notes = read_passages(path, tokenizer, 5)
    words = [
        (p.line, p.document, [[tokenizer.vocabulary[i] for i in s] for s in p.sentences])
        for p in passages
    ]
    assert words == [
        (1, 0, [["the", "day"], ["was", "good"]]),
        (6, 1, [["it", "is", "a", "very", "fine"]]),
        (6, 1, [["book"], ["film"]]),
        (9, 2, [["food"]]),
    ]
    assert "4 passages of 3 document(s), 12 tokens" in notes[0]
    assert "1 line(s) without a word" in notes[1]
    assert "1 line(s) of more than 5 tokens" in notes[2]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"\n \n\n", "is empty"),
        (b"good\nba\xffd\n", r"text\.txt:2: byte 0xff is not UTF-8"),
        (b"good\nda\0y\n", r"text\.txt:2: the line holds a NUL byte"),
        ("good".encode("utf-16"), "UTF-16"),
        (b"[SEP]\n[PAD] [CLS]\n", "holds no words"),
        (b"good\n\nday\n\nfilm\n", "no document has two lines"),
        (None, "does not exist"),
    ],
)
def test_malformed_files_are_one_line(
    content: bytes | None, expected: str, tmp_path: Path, tokenizer: WordPieceTokenizer
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        MaskedLM(tokenizer, sentence_loss="order").load(path)
    assert "\n" not in str(caught.value)


def test_next_sentence_needs_another_document(
    tmp_path: Path, tokenizer: WordPieceTokenizer
) -> None:
    (tmp_path / "text.txt").write_text("the day\nwas good\n")
    with pytest.raises(DataError, match="is one document"):
        MaskedLM(tokenizer, sentence_loss="next").load(tmp_path / "text.txt")


# --- training -----------------------------------------------------------------------------------


def test_learns_and_fills(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    _write_text(folder / "train.txt", 24)
    config = _config(
        folder,
        model__validation_ds__file_path=folder / "train.txt",
        model__train_ds__batch_size=8,
        model__optim__lr=3e-3,
        trainer__max_epochs=40,
        trainer__val_check_interval=30,
    )
    result = finetune(config)
    assert result.best["val_perplexity"] < 2  # 17 words there are
    assert "val_sentence_accuracy" in result.best
    run = load_run(result.path)
    filled = run.predict(["film film [MASK] film film", "good"])
    assert filled[1] == {"text": "good", "masks": []}
    (top,) = filled[0]["masks"]
    assert len(top) == 5
    assert top[0]["probability"] == max(entry["probability"] for entry in top)
    assert top[0]["token"] == "film"
    assert filled[0]["text"] == "film film film film film"
    stdin = io.TextIOWrapper(io.BytesIO(b"nice nice [MASK] nice nice\n"))
    monkeypatch.setattr("sys.stdin", stdin)
    capsys.readouterr()
    assert main(["predict", str(result.path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["text"] == "nice nice nice nice nice"
    out = folder / "out.jsonl"
    assert main(["evaluate", str(result.path), "--predictions", str(out), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["val_perplexity"] == pytest.approx(result.best["val_perplexity"], rel=1e-5)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    mean = sum(row["loss"] for row in rows) / sum(row["masked"] for row in rows)
    assert math.exp(mean) == pytest.approx(metrics["val_perplexity"], rel=1e-9)


def test_loss_is_that_of_the_whole_head(folder: Path) -> None:
    """Masked positions alone give what `-100` labels over all tokens give."""
    job = prepare(_config(folder, model__dataset__sentence_loss=None))
    model = build_model(job, SINGLE[0], torch.device("cpu"))
    batch = job.task.collate(job.train.examples[:5])
    losses = job.task.loss_sums(model.forward_packed(batch.packed, batch.head_labels, 7), batch)
    labels = torch.full((len(batch.packed),), -100)
    labels[batch.head_labels.index] = batch.labels["token"]
    whole = model.forward_packed(batch.packed, labels, 7).loss
    (count,) = job.task.label_counts(batch)
    assert losses.item() / count == pytest.approx(whole.item(), rel=1e-6)
    assert model.eval().forward_packed(batch.packed, batch.head_labels).prediction_logits.shape == (
        int(count),
        model.config.padded_vocab_size or 128,
    )


class _Interrupted(Trainer):
    stop_at = -1

    def train_step(self, *arguments: Any) -> Any:
        result = super().train_step(*arguments)
        return result._replace(signal=15) if self.global_step + 1 == self.stop_at else result


def _fit(
    tp: TensorParallelGroup,
    dp: DataParallelGroup,
    folder: Path,
    version: str,
    stop_at: int = -1,
    **values: Any,
) -> list[dict[str, Any]]:
    config = _config(
        folder,
        exp_manager__version=version,
        exp_manager__resume_if_exists="true",
        model__tensor_model_parallel_size=tp.size,
        model__train_ds__batch_size=3,
        trainer__accumulate_grad_batches=2,
        **values,
    )
    job = on_all_ranks(lambda: prepare(config, tp.size * dp.size), tp, dp)
    trainer = _Interrupted(
        job,
        build_model(job, tp, torch.device("cpu")),
        tp=tp,
        dp=dp,
        run=on_all_ranks(lambda: choose_run(config.exp_manager), tp, dp),
        log=RunLog(enabled=tp.rank == 0 and dp.rank == 0, progress_bar=False),
    )
    trainer.stop_at = stop_at
    try:
        trainer.fit()
    except StoppedError:
        pass
    finally:
        trainer.log.close()
    lines = (trainer.run_path / "metrics.jsonl").read_text().splitlines()
    skipped = ("tokens_per_s", "mfu", "memory_mib")
    return [{k: v for k, v in json.loads(x).items() if k not in skipped} for x in lines]


@pytest.mark.parametrize(("tp_size", "dp_size"), [(2, 1), (1, 2)])
def test_curve_does_not_depend_on_ranks(tp_size: int, dp_size: int, folder: Path) -> None:
    expected = _fit(*SINGLE, folder, "one")
    found = run_mesh(_fit, tp_size, dp_size, folder, "two")[0]
    assert len(found) == len(expected) > 6
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=3e-5)


def test_resumed_run_is_the_uninterrupted_one(folder: Path) -> None:
    whole = _fit(*SINGLE, folder, "whole")
    _fit(*SINGLE, folder, "cut", stop_at=4)
    assert _fit(*SINGLE, folder, "cut") == whole


# --- what comes of it ---------------------------------------------------------------------------


def test_result_starts_fine_tuning(folder: Path) -> None:
    run = finetune(_config(folder, trainer__max_steps=2)).path
    adapted = load_run(run).model.state_dict()
    tiny.write_data(folder / "train.tsv", 8)
    starts = {"megatron": folder / "megatron", "huggingface": folder / "hf"}
    for form, path in starts.items():
        export_run(run, path, format=form)  # type: ignore[arg-type]
        assert checkpoint.inspect(path).head == "pretraining"
    starts["nemo"] = run / "checkpoints" / "tiny.nemo"
    for form, path in starts.items():
        settings = {
            "model__validation_ds__file_path": None,
            "model__language_model__lm_checkpoint": path,
            "model__language_model__config": None,
            "exp_manager__version": form,
        }
        job = prepare(tiny.config(folder, **settings))
        model = build_model(job, SINGLE[0], torch.device("cpu"))
        for name, tensor in model.state_dict().items():
            if not name.startswith("head."):
                rows = min(tensor.shape[0], len(tiny.VOCABULARY))
                assert torch.equal(tensor[:rows], adapted[name][:rows]), (form, name)
        # Adapting goes on with the head of the file.
        settings["model__validation_ds__file_path"] = folder / "validation.txt"
        for loss in ("order", None):
            job = prepare(_config(folder, model__dataset__sentence_loss=loss, **settings))
            assert any("checkpoint's head" in note for note in job.notes)
            head = build_model(job, SINGLE[0], torch.device("cpu")).head
            assert torch.equal(head.lm.dense.weight, adapted["head.lm.dense.weight"])
            assert (head.binary is None) == (loss is None)
            if head.binary is not None:
                assert torch.equal(head.binary.weight, adapted["head.binary.weight"])
