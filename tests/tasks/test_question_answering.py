"""Question answering: files good and bad, windows, decoding, SQuAD's scores, prediction files.

References here are written from the definitions, in another way than the library.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.heads import build_head
from tpcore.models.output import BertOutput
from tpcore.parallel.group import TensorParallelGroup
from tpcore.tasks import DataError, QuestionAnswering
from tpcore.tasks.squad_files import line_of
from tpcore.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer
from tpcore.train.config import config_class
from tpcore.train.read_config import load_config

WORDS = ("john", "lives", "in", "new", "york", "a", "##b", "##c", ".", "who", "where", "?", "the")
TOKENIZER = WordPieceTokenizer((*SPECIAL_TOKENS, *WORDS))
SQUAD = Path(__file__).parents[2] / "examples/squad/dev-v2.0.json"
CONTEXT = "John lives in  New York. abc"


def _squad(*qas: dict[str, Any], context: str = CONTEXT) -> dict[str, Any]:
    return {"version": "v2.0", "data": [{"paragraphs": [{"context": context, "qas": list(qas)}]}]}


def _qa(key: str = "q", text: str = "New York", start: int = 15, **more: Any) -> dict[str, Any]:
    answers = [{"text": text, "answer_start": start}]
    return {"id": key, "question": "where ?", "answers": answers, **more}


@pytest.fixture
def write(tmp_path):
    def write_file(content: Any, name: str = "data.json") -> Path:
        path = tmp_path / name
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def _task(**settings: Any) -> QuestionAnswering:
    return QuestionAnswering(TOKENIZER, **settings)


# --- files --------------------------------------------------------------------------------------


def test_squad_files(write):
    none = {"id": "n", "question": "who ?", "answers": [], "is_impossible": True,
            "plausible_answers": [{"text": "John", "answer_start": 0}]}  # fmt: skip
    path = write(_squad(_qa(is_impossible=False), none))
    dataset = _task(version_2_with_negative=True).load(path)
    first, second = dataset.records
    assert (first.id, first.question, first.context) == ("q", "where ?", CONTEXT)
    assert [(a.text, a.start) for a in first.answers] == [("New York", 15)]
    assert second.answers == ()
    assert "2 questions, 1 of them without an answer, on 1 contexts" in dataset.notes[0]
    with pytest.raises(DataError, match=r"1 question.* the first is 'n'; set .*negative=true"):
        _task().load(path)
    assert _task().load(path, labelled=False).records[1].answers is None
    assert len(_task().load(path, num_samples=1).records) == 1


def test_json_lines(write):
    one = {
        "question": "where?",
        "context": CONTEXT,
        "answers": {"text": ["New"], "answer_start": [15]},
    }
    two = {**one, "id": "b", "answers": [{"text": "York", "answer_start": 19}]}
    path = write(f"{json.dumps(one)}\n\n{json.dumps(two)}\n", "data.jsonl")
    data = _task().load(path)
    assert [(q.id, q.answers[0].text) for q in data.records] == [("1", "New"), ("b", "York")]
    assert f"{path}: 1 blank line(s) left out" in data.notes


BAD_FILES = {
    "empty": ("", r"is empty"),
    "not json": ('{\n"data": [}', r"data.json:2: not JSON: .* at character 10"),
    "array": ([], r"data.json:1: a JSON array"),
    "no data": ({"version": "1.1"}, r"data.json:1: no data; the object has version"),
    "data": ({"data": {}}, r"data.json:1: data is a object"),
    "no questions": ({"data": []}, r"holds no questions"),
    "no paragraphs": ({"data": [{"title": "x"}]}, r"data.json:1: data\[0\]: no paragraphs;"),
    "no context": (
        {"data": [{"paragraphs": [{"qas": [_qa()]}]}]},
        r"data\[0\].paragraphs\[0\].qas\[0\]: no context",
    ),
    "string": ({"data": [{"paragraphs": ["x"]}]}, r"data\[0\].paragraphs\[0\] is a string"),
    "no id": (_squad({"question": "who", "answers": []}), r"qas\[0\]: no id"),
    "same id": (_squad(_qa(), _qa()), r"qas\[1\]: id 'q' is that of .*qas\[0\] already"),
    "empty question": (_squad(_qa(question=" ")), r"the question is empty"),
    "no answers": (_squad({"id": "q", "question": "who"}), r"qas\[0\]: no answers; .*predict"),
    "impossible": (_squad(_qa(is_impossible="no")), r"is_impossible is a string"),
    "contradiction": (_squad(_qa(answers=[], is_impossible=False)), r"answers is empty, and"),
    "other contradiction": (_squad(_qa(is_impossible=True)), r"answers is not empty, and"),
    "key twice": ('{"data": [], "data": [1]}', r"data.json:1: .* has the key 'data' twice"),
    "long number": ('{"data": ' + "1" * 5000, r"data.json:1: a number of 5000 digits"),
    "no start": (_squad(_qa(answers=[{"text": "New"}])), r"answer_start is a null"),
    "half a start": (
        _squad(_qa(answers=[{"text": "New", "answer_start": 1.5}])),
        r"answer_start is 1.5; expected a whole number",
    ),
    "empty answer": (_squad(_qa(text="")), r"an answer is empty"),
    "shifted": (_squad(_qa(start=14)), r"'New York' is not at character 14 .*; it stands at 15"),
    "outside": (_squad(_qa(start=400)), r"'New York' is not at character 400"),
    "negative": (_squad(_qa(start=-13)), r"'New York' is not at character -13"),
    "elsewhere": (_squad(_qa(text="Paris")), r"it stands nowhere in it"),
    "nul": (_squad(_qa(), context=f"{CONTEXT}\0"), r"context holds a NUL"),
    "surrogate": (_squad(_qa(question="\ud800")), r"question holds half of a surrogate pair"),
    "latin-1": (json.dumps(_squad(_qa(question="o\xf9 ?")), ensure_ascii=False).encode("latin-1"),
                r"data.json:1: byte 0xf9"),
    "utf-16": (json.dumps(_squad(_qa())).encode("utf-16"), r"is UTF-16"),
    "deep": ("[" * 100000, r"data.json.*"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(write, content, message):
    with pytest.raises(DataError, match=message) as caught:
        _task(version_2_with_negative=True).load(write(content))
    assert "\n" not in str(caught.value)


def test_errors_have_the_line_of_the_value(write):
    good, bad = _qa(), _qa("r", start=14)
    content = _squad(good)
    content["data"].insert(0, {"title": "y {[,", "paragraphs": []})
    content["data"][1]["paragraphs"].append({"context": CONTEXT, "qas": [_qa("s"), bad]})
    for indent in (1, None):
        text = json.dumps(content, indent=indent)
        before = text[: text.index('"id": "r"')]
        line = before[: before.rindex("{")].count("\n") + 1
        place = rf"data.json:{line}: data\[1\].paragraphs\[1\].qas\[1\]: the answer 'New York'"
        with pytest.raises(DataError, match=place):
            _task().load(write(text))
    assert line_of('\n{"a": [\n1,\n{"b": [2\n]}]}', "a[1].b[0] is") == 4


def test_bom_and_line_ends_do_no_harm(write):
    text = json.dumps(_squad(_qa()), indent=1).replace("\n", "\r\n")
    assert len(_task().load(write(f"\ufeff{text}")).records) == 1


def test_settings_of_nemo():
    config = load_config(
        None,
        ["task=question_answering", "model.train_ds.file=a.json", "model.dataset.use_cache=true",
         "model.token_classifier.num_layers=1", "model.dataset.doc_stride=64"],
    )  # fmt: skip
    assert config.model.source("train_ds") == "a.json"
    assert (config.model.optim.lr, config.trainer.max_epochs) == (3e-5, 2)
    assert config.model.train_ds.batch_size == 24
    assert QuestionAnswering.create(config.model, TOKENIZER, None).doc_stride == 64
    for bad, message in (
        ("model.train_ds.file_path=x", "did you mean model.train_ds.file"),
        ("model.validation_ds=x.json", "holds keys: .*model.validation_ds.file"),
        ("model.dataset.max_seq_length=67", "at least max_query_length . 4 = 68"),
        ("model.dataset.n_best_size=0", "a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(None, ["task=question_answering", bad])


# --- windows ------------------------------------------------------------------------------------


def test_labels_point_at_the_answer(write):
    example = _task().load(write(_squad(_qa()))).examples[0]
    tokens = [TOKENIZER.vocabulary[i] for i in example.input_ids]
    assert tokens == ["[CLS]", "where", "?", "[SEP]", "john", "lives", "in", "new", "york", ".",
                      "a", "##b", "##c", "[SEP]"]  # fmt: skip
    assert example.type_ids == [0] * 4 + [1] * 10
    assert example.labels == (7, 8)
    # Part of a word is marked: the answer is made of the tokens that hold it.
    part = _task().load(write(_squad(_qa(text="bc", start=26)))).examples[0]
    assert part.labels == (11, 12)


def test_windows_cover_the_context_and_own_each_token_once(write):
    context = "john lives in new york . abc " * 20
    start = 11 * 29 + context.index("new york")
    path = write(_squad(_qa(text="new york", start=start), context=context.strip()))
    task = _task(max_seq_length=30, doc_stride=10)
    dataset = task.load(path)
    assert all(len(example) <= 30 for example in dataset.examples)
    owned = [t for e in dataset.examples for t, own in zip(e.window, e.starts, strict=True) if own]
    assert owned == list(range(len(dataset.examples[0].offsets)))
    inside = 0
    for example in dataset.examples:
        answer = range(9 * 11 + 3, 9 * 11 + 5)
        if answer[0] in example.window and answer[-1] in example.window:
            inside += 1
            first, last = example.labels
            assert [TOKENIZER.vocabulary[i] for i in example.input_ids[first : last + 1]] == [
                "new",
                "york",
            ]
            assert example.window[first - example.first] == answer[0]
        else:
            assert example.labels == (0, 0)
    assert inside == 3
    assert any("1 context(s) cut into overlapping windows" in note for note in dataset.notes)


def test_long_questions_are_cut_and_counted(write):
    dataset = _task(max_query_length=3).load(write(_squad(_qa(question="who " * 10))))
    assert dataset.examples[0].first == 5
    assert any("1 question(s) cut" in note for note in dataset.notes)


def test_a_context_of_100_kilobytes(write):
    context = "john lives in " * 8000
    task = _task()
    dataset = task.load(write(_squad(_qa(text="john", start=0), context=context)))
    assert sum(sum(example.starts) for example in dataset.examples) == 24000


# --- loss and decoding --------------------------------------------------------------------------


def _model(task: QuestionAnswering) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(TOKENIZER.vocabulary), hidden_size=32, num_layers=2,
        num_attention_heads=4, max_position_embeddings=64, init_std=0.5,
    )  # fmt: skip
    tp = TensorParallelGroup.single()
    head = build_head(task.head_name, config, tp=tp, **task.head_kwargs())
    return BertModel(config, tp=tp, head=head).eval()


def test_loss_is_the_mean_of_two_cross_entropies(write):
    task = _task()
    context = "john lives in new york . " * 3
    qas = [_qa(str(i), "john", 25 * (i % 3), question="who " * (i + 1)) for i in range(5)]
    dataset = task.load(write(_squad(*qas, context=context)))
    model = _model(task)
    batch = task.collate(dataset.examples)
    output = model.forward_packed(batch.packed)
    expected, start = 0.0, 0
    for example in dataset.examples:
        part = slice(start, start + len(example))
        for logits, at in zip(
            (output.start_logits, output.end_logits), example.labels, strict=True
        ):
            expected += -logits[part].log_softmax(0)[at].item() / 2
        start += len(example)
    assert task.loss_sums(output, batch).item() == pytest.approx(expected, rel=1e-5)
    assert task.label_counts(batch) == (5.0,)


def _reference_nbest(dataset, logits, size, longest, v2):
    """Every span of every window by brute force: {id: ([(text, score)], null score)}."""
    results = {}
    for number, question in enumerate(dataset.records):
        windows = [(e, logits[e.index]) for e in dataset.examples if e.record == number]
        spans, null = [], math.inf
        for example, (start, end) in windows:
            null = min(null, start[0] + end[0])
            for i in range(len(example.window)):
                token = example.window[i]
                context = [
                    min(token - e.window.start, e.window.stop - 1 - token) + 0.01 * len(e.window)
                    if token in e.window
                    else -1
                    for e, _ in windows
                ]
                if windows[context.index(max(context))][0] is not example:
                    continue
                for j in range(i, min(i + longest, len(example.window))):
                    text = question.context[
                        example.offsets[token][0] : example.offsets[example.window[j]][1]
                    ]
                    spans.append((start[example.first + i] + end[example.first + j], text))
        spans.sort(reverse=True)
        different = {}
        for score, text in spans:
            different.setdefault(text, score)
        best = list(different.items())[:size]
        if v2:
            best = [*best[: size - 1], ("", null)]
            best.sort(key=lambda entry: -entry[1])
        results[question.id] = best, null
    return results


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("longest", [1, 4])
def test_nbest_against_brute_force(write, v2, longest):
    draw = random.Random(0)
    qas, words = [], [draw.choice(WORDS[:5]) for _ in range(60)]
    for i in range(6):
        qas.append(_qa(str(i), words[0], 0, question="who " * (i + 1)))
    task = _task(version_2_with_negative=v2, max_seq_length=32, max_query_length=20,
                 doc_stride=9, max_answer_length=longest, n_best_size=7,
                 null_score_diff_threshold=0.5)  # fmt: skip
    dataset = task.load(write(_squad(*qas, context=" ".join(words))))
    assert len(dataset.examples) > 20
    batch = task.collate(dataset.examples)
    generator = torch.Generator().manual_seed(1)
    # Distinct sums, so that no order is a matter of taste.
    start = torch.randn(len(batch.packed), generator=generator)
    end = torch.randn(len(batch.packed), generator=generator)
    output = BertOutput(start.new_zeros(0), start_logits=start, end_logits=end)
    lengths = [len(example) for example in dataset.examples]
    logits = [
        (s.tolist(), e.tolist())
        for s, e in zip(start.split(lengths), end.split(lengths), strict=True)
    ]
    predictions = task.predictions(dataset, task.decode(output, batch))
    expected = _reference_nbest(dataset, logits, 7, longest, v2)
    emptied = 0
    for prediction in predictions:
        nbest, null = expected[prediction["id"]]
        assert [entry["text"] for entry in prediction["nbest"]] == [text for text, _ in nbest]
        scores = [score for _, score in nbest]
        for entry, score in zip(prediction["nbest"], scores, strict=True):
            assert entry["start_logit"] + entry["end_logit"] == pytest.approx(score, abs=1e-5)
            total = sum(math.exp(other) for other in scores)
            assert entry["probability"] == pytest.approx(math.exp(score) / total, rel=1e-4)
            if entry["text"]:
                context = dataset.records[0].context
                assert context[entry["start"] : entry["end"]] == entry["text"]
        text, score = next(entry for entry in nbest if entry[0])
        if v2:
            assert prediction["null_score_diff"] == pytest.approx(null - score, abs=1e-5)
            text = "" if null - score > 0.5 else text
            emptied += not text
        assert prediction["answer"] == text
    assert json.loads(json.dumps(predictions)) == predictions


def test_answers_are_cut_out_of_the_text(write):
    task = _task()
    dataset = task.from_inputs(
        [("where ?", CONTEXT), {"question": "who?", "context": "x", "id": 7}]
    )
    example = dataset.examples[0]
    start, end = (torch.zeros(sum(map(len, dataset.examples))) for _ in range(2))
    start[7], end[8] = 9.0, 9.0
    batch = task.collate(dataset.examples)
    assert not batch.labels
    output = BertOutput(start, start_logits=start, end_logits=end)
    first, second = task.predictions(dataset, task.decode(output, batch))
    assert (first["answer"], first["start"], first["end"]) == ("New York", 15, 23)
    assert len(example) == 14
    assert second["id"] == "7"
    with pytest.raises(ValueError, match="question '1' has no answers to compare"):
        task.metrics(dataset, [first, second])
    for bad, error in (("text", TypeError), (("a",), TypeError), (("a", " "), ValueError)):
        with pytest.raises(error, match="input 1"):
            task.from_inputs([bad])


def test_prediction_files(write, tmp_path):
    task = _task(version_2_with_negative=True)
    dataset = task.load(write(_squad(_qa(), _qa("r"))))
    model = _model(task)
    batch = task.collate(dataset.examples)
    predictions = task.predictions(dataset, task.decode(model.forward_packed(batch.packed), batch))
    task.write_predictions(tmp_path / "predictions.json", dataset, predictions)
    task.write_predictions(tmp_path / "other.json", dataset, predictions)
    task.write_predictions(tmp_path / "all.jsonl", dataset, predictions)
    answers = json.loads((tmp_path / "predictions.json").read_text())
    assert answers == {p["id"]: p["answer"] for p in predictions}
    for nbest, odds in (("nbest.json", "null_odds.json"),
                        ("other.nbest.json", "other.null_odds.json")):  # fmt: skip
        assert list(json.loads((tmp_path / nbest).read_text())) == ["q", "r"]
        assert json.loads((tmp_path / odds).read_text())["q"] == predictions[0]["null_score_diff"]
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == predictions


def test_settings_survive_json():
    config = config_class("question_answering")().model
    config.dataset.n_best_size = 5
    task = QuestionAnswering.create(config, TOKENIZER, None)
    again = QuestionAnswering.from_config(json.loads(json.dumps(task.to_config())), TOKENIZER)
    assert again.to_config() == task.to_config()
    assert again.n_best_size == 5
    with pytest.raises(ValueError, match="num_samples=0"):
        task.load(SQUAD, num_samples=0)
