"""YAML of unknown origin: plain values, or one line, in a moment."""

import time

import pytest

from tpcore.checkpoint import CheckpointError
from tpcore.checkpoint.untrusted.plain_yaml import MAX_BYTES, parse_yaml

yaml = pytest.importorskip("yaml")


def test_plain_values():
    text = """
    target: nemo.collections.nlp.models.X
    model: {hidden_size: 1024, dropout: 0.1, names: [a, "b", 'c'], none: null, flag: true}
    shared: &anchor {a: 1}
    again: *anchor
    long: "%s"
    1: one
    """ % ("x" * 10_000)
    values = parse_yaml(text.encode(), "x.yaml")
    assert values == {str(key): value for key, value in yaml.safe_load(text).items()}
    assert values["model"]["hidden_size"] == 1024
    assert values["again"] == {"a": 1}


LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)
)

ATTACKS = {
    "billion laughs": (LAUGHS, "repeats itself"),
    "merge keys": (MERGES, "merges mappings"),
    "itself": ("a: &a [*a]", "nested too deep"),
    "itself, in a mapping": ("a: &a {b: *a}", "nested too deep"),
    "deep lists": ("a: " + "[" * 100_000, "nested too deep"),
    "deep mappings": ("a: " + "{b: " * 100_000, "nested too deep"),
    "deep indentation": ("\n".join(" " * i + "a:" for i in range(1000)), "nested too deep"),
    "too many entries": ("a: [" + "1," * 60_000 + "]", "too many entries"),
    "a large file": ("a: '" + "x" * MAX_BYTES + "'", "at most"),
    "an integer of 100,000 digits": ("a: " + "9" * 100_000, "100000 characters"),
    "numbers of base 60": ("a: " + "1:" * 50_000 + "1", "characters"),
    "a Python object": ("a: !!python/object/apply:os.system [ls]", "python/object/apply:os.system"),
    "a Python name": ("a: !!python/name:os.system", "python/name"),
    "a tag of its own": ("a: !mine 1", "!mine"),
    "a set": ("a: !!set {b, c}", "2002:set"),
    "a timestamp by its tag": ("a: !!timestamp 2001-01-01", "timestamp"),
    "binary data": ("a: !!binary aGVsbG8=", "binary"),
    "a tag that is redefined": ("%TAG ! tag:yaml.org,2002:python/\n---\na: !name:os.system", "tag"),
    "no UTF-8": (b"a: \xff\xfe", "valid YAML"),
    "a control character": ("a: \x00", "valid YAML"),
    "an unknown anchor": ("a: *b", "valid YAML"),
    "lists as keys": ("? [a]\n: 1", "valid YAML"),
    "a list": ("- 1", "holds a list"),
    "a text": ("text", "holds a str"),
    "nothing": ("", "holds a NoneType"),
    "two documents": ("a: 1\n---\nb: 1", "valid YAML"),
    "a lie about numbers": ("a: !!int not-a-number", "valid YAML"),
    "a date that is none": ("a: 2001-99-99", "valid YAML"),
}


@pytest.mark.parametrize("name", list(ATTACKS))
def test_attacks(name):
    content, said = ATTACKS[name]
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=r"x\.yaml: ") as error:
        parse_yaml(content if isinstance(content, bytes) else content.encode(), "x.yaml")
    assert said in str(error.value)
    assert str(error.value).isprintable()
    assert time.process_time() - begin < 10
