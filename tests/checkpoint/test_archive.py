"""Tar archives: what honest ones hold, and everything that is refused in others."""

import contextlib
import gzip
import io
import os
import random
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcore.checkpoint import CheckpointError
from tpcore.checkpoint.untrusted import tar_members
from tpcore.checkpoint.untrusted.archive import Archive, recognise, unpack

FILES = {
    "model_config.yaml": b"target: a.b\n",
    "mp_rank_00/model_weights.ckpt": bytes(range(256)) * 5000,
    "mp_rank_01/model_weights.ckpt": bytes(range(255, -1, -1)) * 5000,
    "empty": b"",
}
NEMO = Path("../shared/data/nemo_archives")
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
READERS = {
    "list": lambda path, folder: Archive(path),
    "unpack": unpack,
    "extract": lambda path, folder: (a := Archive(path)).extract(list(a.members), folder),
}


def _tar(path, members, *, packed=False, form=tarfile.GNU_FORMAT, **info):
    """Write (name, bytes or None for a folder, fields of TarInfo) with Python's own writer."""
    with tarfile.open(path, "w:gz" if packed else "w", format=form) as tar:
        for name, content, *fields in members:
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            entry.size = len(content or b"")
            for key, value in {**info, **(fields[0] if fields else {})}.items():
                setattr(entry, key, value)
            tar.addfile(entry, io.BytesIO(content or b""))
    return path


def _header(name=b"a", size=b"00000000004\0", kind=b"0", prefix=b""):
    """A header with a right checksum and anything else wrong."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[124 : 124 + len(size)] = b"0000644\0", size
    block[156:157], block[257:265] = kind, b"ustar\x0000"
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _raw(path, *blocks, packed=False):
    content = b"".join(blocks) + bytes(1024)
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


def _refused(path, folder, message):
    for name, read in READERS.items():
        target = folder / name
        target.mkdir()
        with pytest.raises(CheckpointError, match=message) as error:
            read(path, target)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        outside = [p for p in folder.rglob("*") if p.is_symlink() or p.is_fifo()]
        assert not outside
    assert not (folder.parent / "escaped").exists()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


# --- what is read --------------------------------------------------------------------------------


@PACKED
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("start", ["", "./"])
def test_honest_archives(tmp_path, folder, packed, form, start):
    members = [("./", None)] if start else []
    members += [(start + "mp_rank_00/", None), *((start + k, v) for k, v in FILES.items())]
    path = _tar(tmp_path / "x.nemo", members, packed=packed, form=form)
    assert recognise(path)
    with Archive(path) as tar:
        assert list(tar.members) == list(FILES)
        assert {name: member.size for name, member in tar.members.items()} == {
            name: len(content) for name, content in FILES.items()
        }
        assert tar.read("model_config.yaml") == FILES["model_config.yaml"]
        wanted = ["mp_rank_01/model_weights.ckpt", "empty"]
        files = tar.extract(wanted, folder)
        assert sorted(files) == sorted(wanted)
        for name in wanted:
            assert files[name] == folder / name
            assert files[name].read_bytes() == FILES[name]
        with tar.open("mp_rank_00/model_weights.ckpt") as file:
            content = FILES["mp_rank_00/model_weights.ckpt"]
            assert file.seek(-1000, io.SEEK_END) == len(content) - 1000
            assert file.read(10) == content[-1000:-990]
            assert file.seek(0) == 0
            assert file.read() == content
    (folder / "all").mkdir()
    for name, file in unpack(path, folder / "all").items():
        assert file.read_bytes() == FILES[name]


@pytest.mark.skipif(not NEMO.is_dir(), reason="../shared/data/nemo_archives is not here")
@pytest.mark.parametrize("name", ["vad_marblenet.nemo", "vad_multilingual_marblenet.nemo"])
def test_released_archives(folder, name):
    files = unpack(NEMO / name, folder)
    assert set(files) == {"model_config.yaml", "model_weights.ckpt"}
    with tarfile.open(NEMO / name) as reference:
        for key, file in files.items():
            assert file.read_bytes() == reference.extractfile(f"./{key}").read()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_other_alphabets(tmp_path, folder, form):
    names = ["a" * 120 + "/" + "b" * 120, "größe.txt", "模型"]
    path = _tar(tmp_path / "x.tar", [(name, name.encode()) for name in names], form=form)
    assert {k: f.read_bytes() for k, f in unpack(path, folder).items()} == {
        name: name.encode() for name in names
    }


def test_sizes_in_binary(tmp_path):
    size = b"\x80" + (4).to_bytes(11, "big")
    assert Archive(_raw(tmp_path / "x", _header(size=size), bytes(512))).members["a"].size == 4


def test_members_that_are_not_there_or_too_large(tmp_path):
    tar = Archive(_tar(tmp_path / "x.tar", FILES.items()))
    assert "nothing" not in tar
    with pytest.raises(CheckpointError, match="no member 'nothing'"):
        tar.read("nothing")
    with pytest.raises(CheckpointError, match="has 1280000 bytes; at most 1000"):
        tar.read("mp_rank_00/model_weights.ckpt", limit=1000)


def test_what_is_no_archive(tmp_path):
    for content in (b"", b"x" * 600, b"PK\x03\x04" * 200, b"\x1f\x8b" + bytes(600)):
        path = tmp_path / "x"
        path.write_bytes(content)
        assert not recognise(path)
        with pytest.raises(CheckpointError, match=r"x: .*(truncated|damaged)"):
            Archive(path)
    assert not recognise(tmp_path)
    with pytest.raises(CheckpointError, match="is no file"):
        Archive(tmp_path)
    with pytest.raises(CheckpointError, match="is no file"):
        Archive(tmp_path / "nothing")


# --- what is refused -----------------------------------------------------------------------------


@PACKED
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/tmp/escaped", "leads out"),
        ("../escaped", "leads out"),
        ("./../escaped", "leads out"),
        ("a/../../escaped", "leads out"),
        ("a//b", "no plain name"),
        ("a/./b", "no plain name"),
        ("a\nb", "no plain name"),
        ("a\x1b[2Jb", "no plain name"),
        ("..\\escaped", "no plain name"),
        ("/".join("a" * 17), "no plain name"),
        (".", "has the name"),
    ],
)
def test_names_that_lead_elsewhere(tmp_path, folder, name, said, packed):
    path = _tar(tmp_path / "x.tar", [("fine", b"1"), (name, b"2")], packed=packed)
    _refused(path, folder, said)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_that_lead_elsewhere(tmp_path, folder, form):
    name = "x" * 90 + "/../../" + "y" * 90
    _refused(_tar(tmp_path / "x.tar", [(name, b"2")], form=form), folder, "leads out")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.BLKTYPE, "a block device"),
        (tarfile.FIFOTYPE, "a fifo"),
        (tarfile.CONTTYPE, "a contiguous file"),
        (b"S", "a sparse file"),
        (b"M", "a part of a multi-volume"),
        (b"?", r"a member of the unknown type b'\?'"),
    ],
)
def test_members_that_are_no_files(tmp_path, folder, kind, said):
    entry = ("escape", b"", {"type": kind, "linkname": "/etc/passwd"})
    path = _tar(tmp_path / "x.tar", [("fine", b"1"), entry, ("escape/x", b"2")])
    _refused(path, folder, f"'escape' is {said}")


def test_sparse_files_of_pax(tmp_path, folder):
    fields = {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.realsize": "999999999999"}}
    path = _tar(tmp_path / "x.tar", [("a", b"1", fields)], form=tarfile.PAX_FORMAT)
    _refused(path, folder, "sparse")


@PACKED
@pytest.mark.parametrize(
    "names",
    [
        ("a", "a"),
        ("a", "./a"),
        ("a/b", "a"),
        ("a", "a/b"),
        ("a", "a/"),
    ],
)
def test_names_that_occur_twice(tmp_path, folder, names, packed):
    members = [(name, None if name.endswith("/") else b"1") for name in names]
    _refused(_tar(tmp_path / "x.tar", members, packed=packed), folder, "'a' occurs twice")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (b"77777777777\0", "truncated: it claims"),
        (b"\x80" + b"\x7f" * 11, "claims .* at most"),
        (b"\xff" * 12, "damaged or hostile"),
        (b"-0000000001\0", "damaged or hostile"),
        (b"00000000009\0", "damaged or hostile"),
    ],
)
def test_sizes_that_lie(tmp_path, folder, size, said):
    _refused(_raw(tmp_path / "x.tar", _header(size=size), b"1234"), folder, said)


def test_a_gzip_member_that_claims_more_than_there_is(tmp_path, folder):
    path = _raw(tmp_path / "x.tgz", _header(size=b"00000100000\0"), b"1234", packed=True)
    _refused(path, folder, "truncated")


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        (b"x", b"30 path=../escaped\n", "no valid extended header"),
        (b"x", b"18 path=../escape\n", "leads out"),
        (b"x", b"12 path=a\0b\n", "no plain name"),
        (b"x", b"10 size=z\n", "size that is no number"),
        (b"x", b"12 size=-99\n", "size that is no number"),
        (b"x", b"19 size=9999999999\n", "truncated"),
        (b"x", b"99999999 a=b\n", "no valid extended header"),
        (b"x", b"9 path=a\n9 path=b\n", "no valid extended header"),
        (b"g", b"9 path=a\n", "every member one name"),
        (b"g", b"9 size=1\n", "every member one name"),
        (b"L", b"../../escaped\0", "leads out"),
        (b"L", b"\xff\xfe\0", "not UTF-8"),
        (b"K", b"/etc/passwd\0", "a link with a long name"),
    ],
)
def test_extended_headers(tmp_path, folder, kind, body, said):
    size = b"%011o\0" % len(body)
    path = _raw(
        tmp_path / "x.tar",
        _header(b"extended", size, kind),
        body.ljust(512, b"\0"),
        _header(),
        b"1234".ljust(512, b"\0"),
    )
    _refused(path, folder, said)


@PACKED
@pytest.mark.parametrize("kind", [b"x", b"g", b"L"])
def test_extended_headers_of_any_size_are_not_read(tmp_path, folder, kind, packed):
    path = _raw(
        tmp_path / "x", _header(size=b"70000000000\0", kind=kind), bytes(2**16), packed=packed
    )
    _refused(path, folder, "extended header of 7516192768 bytes")


def test_names_that_are_not_utf8(tmp_path, folder):
    _refused(_raw(tmp_path / "x.tar", _header(b"\xff\xfe"), bytes(512)), folder, "not UTF-8")


def test_a_prefix_that_leads_out(tmp_path, folder):
    _refused(_raw(tmp_path / "x.tar", _header(prefix=b"/tmp"), bytes(512)), folder, "leads out")


def test_too_many_members(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(tar_members, "MAX_MEMBERS", 10)
    path = _tar(tmp_path / "x.tar", [(f"f{i}", b"1") for i in range(11)])
    _refused(path, folder, "more than 10 members")
    path = _tar(tmp_path / "y.tar", [(f"d{i}/", None) for i in range(31)])
    (folder / "second").mkdir()
    _refused(path, folder / "second", "more than 10 members")


def test_data_after_the_end(tmp_path, folder):
    path = _tar(tmp_path / "x.tar", [("a", b"1")])
    path.write_bytes(path.read_bytes() + _tar(tmp_path / "y.tar", [("b", b"2")]).read_bytes())
    _refused(path, folder, "data after its end")


@PACKED
def test_truncated_archives(tmp_path, packed):
    generator = random.Random(0)
    content = generator.randbytes(3000)
    whole = _tar(tmp_path / "x", [("a", content), ("b", content)], packed=packed).read_bytes()
    end = len(whole) if packed else 512 + 3072 + 512 + 3072
    path = tmp_path / "cut"
    for length in [0, 1, 100, 511, 512, 513, 1000, *range(0, end, 397), end - 1, end]:
        if packed and length == end:
            continue
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut: .*(truncated|damaged)"):
            Archive(path)


def test_a_gzip_with_a_wrong_checksum(tmp_path, folder):
    path = _tar(tmp_path / "x", FILES.items(), packed=True)
    whole = bytearray(path.read_bytes())
    whole[-6] ^= 1
    path.write_bytes(whole)
    _refused(path, folder, "damaged")


# --- bombs ---------------------------------------------------------------------------------------


def _bomb(path, size, *, kind=b"0", name=b"a"):
    """A gzip of zeros, made piece by piece."""
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(_header(name, b"%011o\0" % size, kind))
        for _ in range(size // 2**20):
            file.write(bytes(2**20))
        file.write(bytes(1024))
    return path


def test_a_gzip_bomb_is_stopped_while_it_unpacks(tmp_path, folder):
    path = _bomb(tmp_path / "x.nemo", 2**27)
    assert path.stat().st_size < 2**19
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="decompression bomb"):
        unpack(path, folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24
    assert (folder / "a").stat().st_size <= tar_members.FREE_BYTES
    with pytest.raises(CheckpointError, match="decompression bomb"):
        Archive(path)


def test_a_bomb_behind_the_end(tmp_path, folder):
    path = tmp_path / "x.nemo"
    with gzip.open(path, "wb") as file:
        file.write(_header() + bytes(512 + 1024) + bytes(2**22))
    _refused(path, folder, "data after its end")


def test_what_a_gzip_may_unpack_to_follows_its_size(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(tar_members, "FREE_BYTES", 1000)
    noise = random.Random(0).randbytes(2**20)
    honest = _tar(tmp_path / "x.nemo", [("a", noise)], packed=True)
    assert unpack(honest, folder)["a"].read_bytes() == noise


def test_a_full_disk_is_one_line(tmp_path):
    path = _tar(tmp_path / "x.nemo", FILES.items())
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match=r"mp_rank_00.*cannot be unpacked.*TMPDIR"):
        Archive(path).extract(["mp_rank_00/model_weights.ckpt"], tmp_path / "taken")


def test_no_descriptor_is_left_open(tmp_path, folder):
    bomb = _bomb(tmp_path / "bomb", 2**27)
    before = len(os.listdir("/proc/self/fd"))
    for packed in (False, True):
        path = _tar(tmp_path / f"x{packed}", FILES.items(), packed=packed)
        with Archive(path) as tar:
            tar.open("mp_rank_00/model_weights.ckpt").close()
        with contextlib.suppress(CheckpointError):
            Archive(bomb)
    assert len(os.listdir("/proc/self/fd")) == before


@PACKED
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_archives_give_members_or_an_error(tmp_path_factory, packed, data):
    path = tmp_path_factory.mktemp("damaged") / "x"
    raw = _tar(path, [("a/b", b"12"), ("c", b"3" * 600)], form=tarfile.PAX_FORMAT).read_bytes()
    raw = bytearray(raw[:4096])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(gzip.compress(raw, 1) if packed else bytes(raw))
    with contextlib.suppress(CheckpointError), Archive(path) as tar:
        for name, member in tar.members.items():
            assert len(tar.read(name)) == member.size
            assert not Path(name).is_absolute()
            assert ".." not in Path(name).parts
