"""SMS Spam Collection to train.tsv and validation.tsv: duplicates out first, then a fixed split.

    python examples/prepare_sms_spam.py OUTPUT_FOLDER [--source FILE] [--validation-percent 20]

The collection holds hundreds of repeated messages. A split that leaves them in puts copies of
training messages into the validation set, and the accuracy measured there is too good. So:

1. Two messages are duplicates when their texts are equal after Unicode NFKC, case folding and
   collapsing every run of white space to one blank: an uncased model cannot tell them apart.
   The first of them is kept, as it was written. Duplicates with different labels are printed and
   all of them are dropped, since nobody can say which label is right.
2. Within each label the kept messages are ordered by the SHA-256 of their normalised text; the
   first 20 percent go to validation, the others to training. The split depends on the messages
   alone: not on their order, on a seed, or on a version of Python.
3. Both files keep the order and the form of the source: `label<TAB>text`, UTF-8, no header.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parent / "sms_spam" / "SMSSpamCollection.tsv"


class Message(NamedTuple):
    """One line of the collection."""

    line_number: int
    label: str
    text: str

    @property
    def key(self) -> str:
        """What two duplicates have in common."""
        return " ".join(unicodedata.normalize("NFKC", self.text).casefold().split())


def read_messages(path: Path) -> list[Message]:
    """Every line of a `label<TAB>text` file."""
    messages = []
    # Only \n ends a line here: str.splitlines would also cut at U+0085 and other rare characters.
    for line_number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line:
            continue
        label, tab, text = line.partition("\t")
        if not tab or not text.strip():
            raise ValueError(f"{path}:{line_number}: expected label<TAB>text, got {line[:60]!r}")
        messages.append(Message(line_number, label, text))
    if not messages:
        raise ValueError(f"{path}: the file holds no messages")
    return messages


def remove_duplicates(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """(the first message of each text, the groups whose copies disagree about the label)."""
    groups: dict[str, list[Message]] = {}
    for message in messages:
        groups.setdefault(message.key, []).append(message)
    kept, conflicts = [], []
    for group in groups.values():
        if len({message.label for message in group}) > 1:
            conflicts.append(group)
        else:
            kept.append(group[0])
    return kept, conflicts


def split(
    messages: list[Message], validation_percent: float
) -> tuple[list[Message], list[Message]]:
    """(training, validation), stratified by label, decided by a hash of each text."""
    validation_lines = set()
    for label in {message.label for message in messages}:
        of_label = [message for message in messages if message.label == label]
        of_label.sort(key=lambda message: hashlib.sha256(message.key.encode()).digest())
        num_validation = round(len(of_label) * validation_percent / 100)
        validation_lines.update(message.line_number for message in of_label[:num_validation])
    training = [message for message in messages if message.line_number not in validation_lines]
    validation = [message for message in messages if message.line_number in validation_lines]
    return training, validation


def main() -> int:
    """The command line; 2 when a file cannot be read or written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_folder", type=Path)
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--validation-percent", type=float, default=20.0)
    args = parser.parse_args()
    if not 0 < args.validation_percent < 100:
        parser.error(f"--validation-percent={args.validation_percent} is not between 0 and 100")

    try:
        messages = read_messages(args.source)
        kept, conflicts = remove_duplicates(messages)
        training, validation = split(kept, args.validation_percent)
        args.output_folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("train.tsv", training), ("validation.tsv", validation)):
            content = "".join(f"{message.label}\t{message.text}\n" for message in part)
            (args.output_folder / name).write_text(content, encoding="utf-8", newline="\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    for group in conflicts:
        places = ", ".join(f"{message.label} in line {message.line_number}" for message in group)
        print(f"dropped, its copies have different labels ({places}): {group[0].text!r}")
    num_conflicting = sum(len(group) for group in conflicts)
    print(f"{len(messages)} messages read from {args.source}")
    print(f"{len(messages) - len(kept) - num_conflicting} duplicates removed")
    print(f"{num_conflicting} messages dropped because their copies have different labels")
    for name, part in (("train.tsv", training), ("validation.tsv", validation)):
        counts = Counter(message.label for message in part)
        by_label = ", ".join(f"{label} {count}" for label, count in sorted(counts.items()))
        print(f"{len(part)} messages written to {args.output_folder / name} ({by_label})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
