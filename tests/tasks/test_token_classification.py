"""Token classification: data files good and bad, windows, loss, decoding, prediction files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.heads import IGNORE_INDEX, build_head
from tpcore.parallel.group import TensorParallelGroup
from tpcore.tasks import DataError, TokenClassification
from tpcore.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer
from tpcore.train.config import config_class
from tpcore.train.read_config import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = ("john", "lives", "in", "new", "york", "a", "##b", "##c", ".", "'", "s")
TOKENIZER = WordPieceTokenizer((*SPECIAL_TOKENS, *WORDS))

CONLL = """\
John B-PER
lives O
in O
New B-LOC
York I-LOC
. O

abc O
John B-PER
"""
EXPECTED = [
    (["John", "lives", "in", "New", "York", "."], ["B-PER", "O", "O", "B-LOC", "I-LOC", "O"]),
    (["abc", "John"], ["O", "B-PER"]),
]


@pytest.fixture
def write(tmp_path):
    def write_file(content: str | bytes, name: str = "data.conll") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def _create(source: Any, **dataset: Any) -> TokenClassification:
    config = config_class("token_classification")().model
    config.class_labels.class_labels_file = dataset.pop("labels_file", None)
    for key, value in dataset.items():
        setattr(config.dataset, key, value)
    return TokenClassification.create(config, TOKENIZER, source)


def _contents(dataset) -> list[tuple[list[str], list[str]]]:
    return [(record.words, list(record.labels)) for record in dataset.records]


JSON_TOKENS = "".join(
    json.dumps({"tokens": words, "ner_tags": labels}) + "\n" for words, labels in EXPECTED
)
JSON_SPANS = """\
{"text": "John lives in New York.", "entities": [{"start": 14, "end": 22, "type": "LOC"}, \
{"start": 0, "end": 4, "label": "PER"}]}
{"text": "abc  John", "entities": [{"start": 5, "end": 9, "type": "PER"}]}
"""

GOOD_FILES = {
    "blanks": CONLL,
    "tabs": CONLL.replace(" ", "\t"),
    "runs of blanks": CONLL.replace(" ", "    "),
    "four columns": "".join(
        f"{line.split()[0]} NN x {line.split()[1]}\n" if line else "\n"
        for line in CONLL.splitlines()
    ),
    "documents and comments": f"-DOCSTART- -X-\n\n# id 1 of 2\n{CONLL}\n-DOCSTART- -X-\n\n",
    "IOB1": CONLL.replace("B-", "I-"),
    "IOBES": CONLL.replace("B-PER", "S-PER").replace("I-LOC", "E-LOC"),
    "crlf, bom, blank line of tabs": "\ufeff"
    + CONLL.replace("\n\n", "\n\t \n").replace("\n", "\r\n"),
    "mixed line ends, no last one": CONLL.replace("O\n", "O\r\n").rstrip("\n"),
}


@pytest.mark.parametrize("content", GOOD_FILES.values(), ids=GOOD_FILES)
def test_columns(write, content):
    task = _create(write(CONLL))
    path = write(content)
    dataset = task.load(path)
    assert _contents(dataset) == EXPECTED
    lines = content.split("\n")
    assert all(r.words[0] in lines[r.line - 1] for r in dataset.records)
    assert any("3 entities: LOC 1, PER 2" in note for note in dataset.notes)
    for kind, count in (("-DOCSTART-", 2), ("comment", 1)):
        noted = any(f"{count} {kind}" in note for note in dataset.notes)
        assert noted == ("-DOCSTART-" in content)
    converted = [note for note in dataset.notes if "converted" in note]
    schemes = {"I-PER": "IOB1", "S-PER": "IOBES"}
    scheme = next((s for mark, s in schemes.items() if mark in content), None)
    assert bool(converted) == (scheme is not None)
    if scheme:
        assert f"from {scheme} to IOB2" in converted[0]
        # Learnt from, such a file gives its own labels.
        own = _create(path)
        assert own.scheme == scheme


def test_labels_are_outside_first_then_all_of_the_scheme(write):
    assert _create(write(CONLL)).labels.names == ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")
    iobes = _create(write("John S-PER\n"))
    assert iobes.labels.names == ("O", "B-PER", "E-PER", "I-PER", "S-PER")
    assert _create(write("John PER\nlives O\n")).labels.names == ("O", "PER")
    assert _create(write("John B\nx O\n")).labels.names == ("O", "B", "I")


def test_label_file(write):
    labels = write("O\nB-PER\nI-PER\nB-LOC\nI-LOC\n", "label_ids.csv")
    task = _create(write(CONLL), labels_file=str(labels))
    assert task.labels.names == ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    assert _create(None, labels_file=str(labels)).scheme == "IOB2"
    wrong = write("B-PER\nO\n", "wrong.csv")
    with pytest.raises(DataError, match=r"wrong.csv:1: 'B-PER'; expected .*pad_label=O"):
        _create(write(CONLL), labels_file=str(wrong))


@pytest.mark.parametrize("content", [JSON_TOKENS, JSON_SPANS], ids=["tokens", "spans"])
def test_json_lines(write, content):
    path = write(content, "data.jsonl")
    task = _create(path)
    assert _contents(task.load(path)) == EXPECTED
    assert task.scheme == "IOB2"


def test_entities_that_are_no_words_are_counted(write):
    spans = [(0, 4), (5, 7), (7, 9), (9, 10)]  # a word, two halves of one, a blank
    entities = [{"start": start, "end": end, "type": "PER"} for start, end in spans]
    value = {"text": "John York a bc", "entities": entities}
    path = write(json.dumps(value), "data.jsonl")
    dataset = _create(path).load(path)
    assert _contents(dataset) == [(["John", "York", "a", "bc"], ["B-PER", "B-PER", "O", "O"])]
    assert f"{path}: 1 entities begin or end inside of a word; all of the word belongs to them" in (
        dataset.notes
    )
    assert f"{path}: 2 entities without a word of their own left out" in dataset.notes


def test_text_and_labels(write, tmp_path):
    text = write("John lives in New York .\n\nabc John\n", "text_train.txt")
    labels = write("B-PER O O B-LOC I-LOC O\n\nO B-PER\n", "labels_train.txt")
    task = _create((text, labels))
    for source in ((text, labels), text):  # the partner is found by its name
        dataset = task.load(source)
        assert _contents(dataset) == EXPECTED
        assert any("1 blank line(s) left out" in note for note in dataset.notes)
    predictions = [{"labels": labels} for _, labels in EXPECTED]
    task.write_predictions(tmp_path / "out.txt", dataset, predictions)
    assert (tmp_path / "out.txt").read_text() == labels.read_text()


def test_sources_of_the_configuration(write):
    overrides = ["task=token_classification", "model.dataset.data_dir=d"]
    config = load_config(
        None,
        [
            *overrides,
            "model.train_ds.text_file=text_train.txt",
            "model.train_ds.labels_file=labels_train.txt",
            "model.validation_ds.file_path=dev.conll",
        ],
    )
    assert config.model.source("train_ds") == ("d/text_train.txt", "d/labels_train.txt")
    assert config.model.source("validation_ds") == "dev.conll"
    assert config.model.source("test_ds") is None
    for bad, message in (
        ("train_ds.text_file=x", "text_file='x'.*labels_file"),
        ("dataset.scheme=IOB3", "did you mean IOB2"),
        ("dataset.doc_stride=127", "at most max_seq_length - 2 = 126"),
        ("dataset.label_column=ner", "the number of a column"),
        ("head.fc_dropout=1", "a probability below 1"),
        ("head.fc_dropot=0", "did you mean model.head.fc_dropout"),
        ("dataset.text_column=0", "it belongs to task=text_classification"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(None, [*overrides, f"model.{bad}"])


BAD_FILES = {
    "empty": ("", r"is empty"),
    "blank": ("\n \n", r"is empty"),
    "one column": ("John\nlives\n", r"data.conll:1: 1 column; expected a word and its label"),
    "missing column": ("John B-PER\nlives O\nin\n", r"data.conll:3: 1 column\(s\), while 2 of 3"),
    "extra column": ("John B-PER\nlives O\nin O O\n", r"data.conll:3: 3 column\(s\)"),
    "empty word": ("John\tO\n\tO\n", r"data.conll:2: the word is empty"),
    "empty label": ("John\tO\nlives\t \n", r"data.conll:2: the label is empty"),
    "unknown label": ("John B-ORG\n", r"data.conll:1: unknown label 'B-ORG' \(did you mean 'B-"),
    "no mark": ("John B-PER\n\nin O\nNew LOC\n", r"data.conll:4: label 'LOC' begins with none"),
    "latin-1": ("Jos\xe9 B-PER\n".encode("latin-1"), r"data.conll:1: byte 0xe9 .*iconv"),
    "nul": (b"John O\nx\0 O\n", r"data.conll:2: .*NUL"),
    "utf-16": ("John O\n".encode("utf-16"), r"UTF-16"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_columns(write, content, message):
    task = _create(write(CONLL))
    with pytest.raises(DataError, match=message) as caught:
        task.load(write(content))
    assert "\n" not in str(caught.value)


BAD_JSON = {
    "not json": ("{]\n", r"data.jsonl:1: not JSON: .* at character 2"),
    "array": ("[]\n", r"data.jsonl:1: a JSON array; expected an object"),
    "no labels": ('{"tokens": ["a"]}\n', r"data.jsonl:1: no labels or tags or ner_tags; .*tokens"),
    "count": ('\n{"tokens": ["a"], "labels": []}\n', r"data.jsonl:2: 0 labels for 1 words"),
    "numbers": ('{"tokens": ["a"], "labels": [1]}\n', r"data.jsonl:1: labels is no array of str"),
    "empty word": ('{"tokens": [" "], "labels": ["O"]}\n', r"data.jsonl:1: a word is empty"),
    "no text": ('{"txt": "a"}\n', r"data.jsonl:1: no text or sentence; the object has txt"),
    "no entities": ('{"text": "a"}\n', r"data.jsonl:1: no entities"),
    "outside": (
        '{"text": "abc", "entities": [{"start": 1, "end": 4, "type": "PER"}]}\n',
        r"data.jsonl:1: entity 'PER' from 1 to 4 is not inside the text of 3 characters",
    ),
    "overlap": (
        '{"text": "a b c", "entities": [{"start": 0, "end": 3, "type": "PER"}, '
        '{"start": 2, "end": 5, "type": "LOC"}]}\n',
        r"data.jsonl:1: entities 'PER' and 'LOC' overlap at character 2",
    ),
    "nul": ('{"text": "a\\u0000", "entities": []}\n', r"data.jsonl:1: text holds a NUL"),
    "surrogate": ('{"text": "\\ud800", "entities": []}\n', r"data.jsonl:1: text holds half"),
    "deep": ("[" * 100000 + "\n", r"data.jsonl:1: .*"),
}


@pytest.mark.parametrize(("content", "message"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json(write, content, message):
    task = _create(write(CONLL))
    with pytest.raises(DataError, match=message) as caught:
        task.load(write(content, "data.jsonl"))
    assert "\n" not in str(caught.value)


def test_bad_pairs(write):
    task = _create(write(CONLL))
    text = write("John lives\nabc\n", "text.txt")
    with pytest.raises(DataError, match=r"has 2 lines, but .*labels.txt has 1"):
        task.load((text, write("O O\n", "labels.txt")))
    with pytest.raises(DataError, match=r"labels.txt:1: 1 labels for the 2 words of .*text.txt:1"):
        task.load((text, write("O\nO\n", "labels.txt")))
    with pytest.raises(DataError, match=r"labels.txt:2: unknown label 'X'"):
        task.load((text, write("O O\nX\n", "labels.txt")))


def test_labels_stand_on_first_pieces(write):
    task = _create(write(CONLL))
    example = task.load(write("abc B-PER\nJohn O\n")).examples[0]
    assert [TOKENIZER.vocabulary[i] for i in example.input_ids] == [
        "[CLS]", "a", "##b", "##c", "john", "[SEP]",
    ]  # fmt: skip
    none, person = IGNORE_INDEX, task.labels.names.index("B-PER")
    assert example.labels == [none, person, none, none, 0, none]
    assert example.words == ((1, 3, 0), (4, 1, 1))
    everywhere = _create(write(CONLL), ignore_extra_tokens=False, ignore_start_end=False)
    example = everywhere.load(write("abc B-PER\nJohn O\n")).examples[0]
    assert example.labels == [0, person, person, person, 0, 0]
    assert example.words == ((1, 3, 0), (4, 1, 1))


def test_a_word_without_pieces_keeps_its_label(write):
    task = _create(write(CONLL))
    example = task.load(write("\u200d B-PER\nJohn O\n")).examples[0]
    assert example.input_ids[1] == TOKENIZER.unk_id
    assert example.labels[1:3] == [task.labels.names.index("B-PER"), 0]


TEXT = ["ab", "abc", "john", "new", ".", "in"]
TEXT_LABELS = ["O", "B-PER", "I-PER", "B-LOC", "O", "O"]


def test_windows_learn_and_decode_every_word_once(write):
    lines = "".join(
        f"{word} {label}\n" for word, label in zip(TEXT * 9, TEXT_LABELS * 9, strict=True)
    )
    path = write(lines)
    task = _create(path, max_seq_length=12, doc_stride=4)
    dataset = task.load(path)
    assert len(dataset.examples) > 5
    assert all(len(example) <= 12 for example in dataset.examples)
    assert any("1 sentence(s) longer than" in note for note in dataset.notes)
    assert sorted(w for e in dataset.examples for _, _, w in e.words) == list(range(54))
    learnt = [i for e in dataset.examples for i in e.labels if i != IGNORE_INDEX]
    assert len(learnt) == 54
    for example in dataset.examples:
        record = dataset.records[example.record]
        for at, _, word in example.words:
            piece = TOKENIZER.vocabulary[example.input_ids[at]]
            assert record.words[word].startswith(piece)
            assert task.labels.names[example.labels[at]] == record.labels[word]
    # Perfect outputs of the windows join to the true labels.
    decoded = [[(w, e.labels[at], 1.0) for at, _, w in e.words] for e in dataset.examples]
    predictions = task.predictions(dataset, decoded)
    assert predictions[0]["labels"] == list(dataset.records[0].labels)
    assert task.metrics(dataset, predictions)["f1"] == 1.0


def test_a_line_of_100_kilobytes(write):
    task = _create(write(CONLL))
    many = write("abc " * 25000 + "\n", "text_dev.txt")
    write("O " * 25000 + "\n", "labels_dev.txt")
    dataset = task.load(many)
    assert sum(len(e.words) for e in dataset.examples) == 25000
    one = task.load(write("x" * 100_000 + " B-PER\n"))
    assert one.examples[0].input_ids[1] == TOKENIZER.unk_id


def _model(task: TokenClassification) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(TOKENIZER.vocabulary), hidden_size=32, num_layers=2,
        num_attention_heads=4, max_position_embeddings=64, init_std=0.3,
    )  # fmt: skip
    tp = TensorParallelGroup.single()
    head = build_head(task.head_name, config, tp=tp, **task.head_kwargs())
    return BertModel(config, tp=tp, head=head).eval()


@pytest.mark.parametrize("balancing", [None, "weighted_loss"])
def test_loss_counts_each_label(write, balancing):
    path = write(CONLL)
    task = _create(path, class_balancing=balancing)
    if balancing:
        # 8 words, 5 labels: O 4 times, B-PER 2, B-LOC and I-LOC 1, I-PER never.
        assert task.class_weights == (8 / 20, 8 / 5, 8 / 10, 8 / 5, 1.0)
    batch = task.collate(task.load(path).examples)
    output = _model(task).forward_packed(batch.packed)
    flat = batch.labels["token"]
    log = F.log_softmax(output.logits, dim=-1)
    weights = torch.tensor(task.class_weights or [1.0] * 5)
    expected = sum(-weights[i] * log[row, i] for row, i in enumerate(flat.tolist()) if i >= 0)
    torch.testing.assert_close(task.loss_sums(output, batch), expected.reshape(1))
    assert task.label_counts(batch)[0] == pytest.approx(
        sum(weights[i].item() for i in flat.tolist() if i >= 0)
    )


def test_predictions_by_words_and_characters(write, tmp_path):
    task = _create(write(CONLL))
    model = _model(task)
    dataset = task.from_inputs(["John lives  in New York.", ["New York", "."]])
    assert dataset.records[0].words == ["John", "lives", "in", "New", "York", "."]
    batch = task.collate(dataset.examples)
    assert not batch.labels
    decoded = task.decode(model.forward_packed(batch.packed), batch)
    assert [[w for w, _, _ in d] for d in decoded] == [[0, 1, 2, 3, 4, 5], [0, 1]]
    ids = {name: i for i, name in enumerate(task.labels.names)}
    decoded = [
        [(0, ids["B-PER"], 0.9), (1, 0, 1.0), (2, 0, 1.0), (3, ids["B-LOC"], 0.8),
         (4, ids["I-LOC"], 0.7), (5, 0, 1.0)],
        [(0, ids["I-LOC"], 0.6), (1, 0, 1.0)],
    ]  # fmt: skip
    first, second = task.predictions(dataset, decoded)
    assert first["entities"] == [
        {"type": "PER", "start": 0, "end": 4, "text": "John", "probability": 0.9},
        {"type": "LOC", "start": 15, "end": 23, "text": "New York", "probability": 0.7},
    ]
    assert [e["text"] for e in second["entities"]] == ["New York"]
    json.dumps([first, second])
    task.write_predictions(tmp_path / "out.jsonl", dataset, [first, second])
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written[0] == {"line": 1, **first}
    with pytest.raises(ValueError, match="line 1 has no labels"):
        task.metrics(dataset, [first, second])
    for bad, error in ((3, TypeError), (["a", 1], TypeError), (["a", ""], ValueError)):
        with pytest.raises(error, match="input 1"):
            task.from_inputs([bad])


def test_predictions_in_the_format_of_the_input(write, tmp_path):
    task = _create(write(CONLL))
    content = "-DOCSTART- -X-\n\n# one\nJohn\tx\tB-PER\nNew\ty\tO\n\n\nYork\tz\tB-LOC\n\n"
    dataset = task.load(write(content, "in.conll"))
    predictions = [{"labels": ["O", "B-LOC"]}, {"labels": ["B-LOC"]}]
    task.write_predictions(tmp_path / "out.conll", dataset, predictions)
    assert (tmp_path / "out.conll").read_text() == (
        "-DOCSTART- -X-\n\n# one\nJohn\tx\tB-PER\tO\nNew\ty\tO\tB-LOC\n\n\n"
        "York\tz\tB-LOC\tB-LOC\n\n"
    )
    dataset = task.load(write(JSON_TOKENS, "in.jsonl"))
    predictions = [{"labels": labels} for _, labels in EXPECTED]
    task.write_predictions(tmp_path / "out.txt", dataset, predictions)
    rows = [json.loads(line) for line in (tmp_path / "out.txt").read_text().splitlines()]
    assert [row["predicted_labels"] for row in rows] == [labels for _, labels in EXPECTED]
    assert [row["tokens"] for row in rows] == [words for words, _ in EXPECTED]


def test_files_without_labels(write):
    task = _create(write(CONLL))
    words = [words for words, _ in EXPECTED]
    for content in ("John\nlives\nin\nNew\nYork\n.\n\nabc\nJohn\n", CONLL):
        assert [r.words for r in task.load(write(content), labelled=False).records] == words
    sentences = write("John lives in New York.\n\nabc John\n", "new.txt")
    assert [r.words for r in task.load(sentences, labelled=False).records] == words
    objects = write('{"text": "abc John"}\n', "new.jsonl")
    assert [r.words for r in task.load(objects, labelled=False).records] == words[1:]


def test_settings_survive_json(write):
    task = _create(write(CONLL), class_balancing="weighted_loss", doc_stride=7)
    config = json.loads(json.dumps(task.to_config()))
    again = TokenClassification.from_config(config, TOKENIZER)
    assert again.to_config() == task.to_config()
    assert again.class_weights == task.class_weights
    assert len(task.load(write(CONLL), num_samples=1).records) == 1
    with pytest.raises(ValueError, match="num_samples=0"):
        task.load(write(CONLL), num_samples=0)
