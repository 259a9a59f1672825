"""Small data for tasks whose usual corpora may not be shipped: files of this folder.

    python examples/make_small_data.py OUTPUT_FOLDER [--texts FOLDER]

punctuation     the sentences of masked_lm/ in lower case without marks, and what was taken away
overlap         pairs of texts of masked_lm/, the second with some words replaced; the number is 5 x
                the part of the words that was kept
intent_slot     orders to a household from patterns; names differ between training and validation
relations       a substance and a protein, both invented, in sentences from patterns

The last two are no natural language: they show formats and that a run learns, nothing more. All of
it is a function of this file and the texts.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

TEXTS = Path(__file__).resolve().parent / "masked_lm"
PARTS = ("train", "validation")
SIZES = {"train": 800, "validation": 200}
"""Of what is made from patterns."""

MARKS = {",": ",", ".": ".", "?": "?", ";": ",", ":": ",", "!": "."}
"""What stands behind a word, and the label for it."""

ORDERS = {
    "alarm": (
        "wake me at {time}",
        "set an alarm for {time} {day}",
        "{day} i have to rise at {time}",
    ),
    "music": (
        "play {title} by {artist}",
        "i want to hear {artist}",
        "put on {title} in the {room}",
    ),
    "weather": (
        "will it rain in {city} {day}",
        "weather in {city} please",
        "how warm is {city} {day}",
    ),
    "light": (
        "turn off the light in the {room}",
        "make the {room} brighter",
        "lights on in the {room}",
    ),
}
NAMES = {
    "time": ("seven", "half past six", "noon", "ten to nine", "five thirty", "quarter past eight"),
    "day": ("today", "tomorrow", "on monday", "on friday", "this weekend", "next week"),
    "title": ("autumn leaves", "the long road", "blue river", "morning song", "old friends"),
    "artist": ("anna holm", "the paper boats", "john farrow", "silver street", "maria conte"),
    "city": ("london", "new york", "oslo", "san francisco", "rome", "cape town", "lima"),
    "room": ("kitchen", "living room", "bath", "hall", "guest room", "attic"),
}

RELATIONS = {
    "INHIBITOR": (
        "{a} inhibits {b} in {c}",
        "{b} is blocked by {a}",
        "{a} reduced the activity of {b}",
    ),
    "ACTIVATOR": (
        "{a} activates {b} in {c}",
        "{b} is stimulated by {a}",
        "{a} raised the activity of {b}",
    ),
    "SUBSTRATE": (
        "{a} is metabolised by {b}",
        "{b} converts {a} in {c}",
        "{a} is transported by {b}",
    ),
    "false": (
        "{a} and {b} were measured in {c}",
        "neither {a} nor {b} was found in {c}",
        "{a} was given before {b} was sampled",
    ),
}
SYLLABLES = ("vel", "ota", "rin", "mex", "pra", "lor", "dan", "zip", "cor", "tal", "fen", "qui")
ENDINGS = ("ine", "ol", "ate", "amide")
PLACES = ("liver cells", "blood", "cultured neurons", "healthy volunteers", "the kidney")


def sentences(path: Path) -> Iterator[str]:
    """The lines of a text that are neither blank nor short."""
    for line in path.read_text(encoding="utf-8").split("\n"):
        if len(line.split()) > 5:
            yield line


def labelled_words(sentence: str) -> tuple[list[str], list[str]]:
    """Lower-case words, and for each the mark behind it and whether it has a capital."""
    words, labels = [], []
    for token in sentence.split():
        word = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9]+$", "", token)
        if word:
            mark = next(
                (MARKS[c] for c in token[token.index(word) + len(word) :] if c in MARKS), "O"
            )
            words.append(word.lower())
            labels.append(mark + ("U" if word[0].isupper() else "O"))
    return words, labels


def make_punctuation(folder: Path, texts: Path) -> None:
    """See the module; sentences in their order."""
    for part in PARTS:
        pairs = [labelled_words(sentence) for sentence in sentences(texts / f"{part}.txt")]
        for name, column in (("text", 0), ("labels", 1)):
            write(folder / f"{name}_{part}.txt", [" ".join(pair[column]) for pair in pairs])


def make_overlap(folder: Path, texts: Path) -> None:
    """See the module; how many words are kept is drawn for each pair."""
    for part in PARTS:
        draws = random.Random(part)
        lines = [s.replace("\t", " ") for s in sentences(texts / f"{part}.txt")]
        others = [word for line in lines for word in line.split()]
        rows = ["sentence1\tsentence2\tscore"]
        for line in lines:
            words = line.split()[:24]
            kept = draws.random()
            second = [word if draws.random() < kept else draws.choice(others) for word in words]
            same = sum(a == b for a, b in zip(words, second, strict=True))
            rows.append(f"{' '.join(words)}\t{' '.join(second)}\t{5 * same / len(words):.2f}")
        write(folder / f"{part}.tsv", rows)


def names_of(part: str, kind: str) -> Sequence[str]:
    """The last third of the names is for validation."""
    names = NAMES[kind]
    cut = len(names) - len(names) // 3
    return names[cut:] if part == "validation" else names[:cut]


def make_intent_slot(folder: Path) -> None:
    """See the module; files as NeMo has them."""
    slots = [f"{mark}-{kind}" for kind in NAMES for mark in "BI"]
    slots.append("O")
    write(folder / "dict.intents.csv", ORDERS)
    write(folder / "dict.slots.csv", slots)
    for part in PARTS:
        draws = random.Random(part)
        rows, numbers = ["sentence\tlabel"], []
        for _ in range(SIZES[part]):
            intent = draws.choice(tuple(ORDERS))
            words: list[str] = []
            labels: list[str] = []
            for word in draws.choice(ORDERS[intent]).split():
                kind = word.strip("{}")
                own = draws.choice(names_of(part, kind)).split() if kind != word else [word]
                words += own
                labels += ["O"] if kind == word else [f"B-{kind}", *[f"I-{kind}"] * (len(own) - 1)]
            rows.append(f"{' '.join(words)}\t{list(ORDERS).index(intent)}")
            numbers.append(" ".join(str(slots.index(label)) for label in labels))
        write(folder / f"{part}.tsv", rows)
        write(folder / f"{part}_slots.tsv", numbers)


def make_relations(folder: Path) -> None:
    """See the module; JSON lines as ChemProt has them."""
    for part in PARTS:
        draws = random.Random(part)
        lines = []
        for _ in range(SIZES[part]):
            label = draws.choice(tuple(RELATIONS))
            substance = "".join(draws.choices(SYLLABLES, k=2)) + draws.choice(ENDINGS)
            protein = "".join(draws.choices("ABCDGKLMPRST", k=3)) + str(draws.randint(1, 9))
            names = {
                "a": f"<< {substance} >>",
                "b": f"[[ {protein} ]]",
                "c": draws.choice(PLACES),
            }
            lines.append(
                json.dumps({"text": draws.choice(RELATIONS[label]).format(**names), "label": label})
            )
        write(folder / f"{part}.jsonl", lines)


def write(path: Path, lines: Iterable[str]) -> None:
    """A text file of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def main() -> None:
    """Write all four folders."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--texts", type=Path, default=TEXTS)
    arguments = parser.parse_args()
    make_punctuation(arguments.output / "punctuation", arguments.texts)
    make_overlap(arguments.output / "overlap", arguments.texts)
    make_intent_slot(arguments.output / "intent_slot")
    make_relations(arguments.output / "relations")


if __name__ == "__main__":
    main()
