"""Parts of tensors, read from files: any box of any layout, and nothing but it."""

import random

import pytest
import torch

from tpcore.checkpoint import CheckpointError, stored
from tpcore.checkpoint.stored import (
    FilePiece,
    FoldedPiece,
    HeldPiece,
    embedded_piece,
    file_pieces,
    joined,
    whole,
)
from tpcore.checkpoint.untrusted.unpickle import load_pickle


def _tensors():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(7, 5, 6, generator=generator)
    return {
        "plain": torch.randn(10, 8, generator=generator),
        "transposed": torch.randn(8, 10, generator=generator).t(),
        "rows of another": base[2:5],
        "strided": base[:, 1:3, ::2],
        "scalar": torch.tensor(3.0),
        "bfloat16": torch.randn(4, generator=generator).bfloat16(),
        "empty": torch.empty(0, 3),
    }


def _boxes(shape, count=40):
    draw = random.Random(0)
    for _ in range(count):
        starts = [draw.randint(0, size) for size in shape]
        yield tuple((a, draw.randint(a, n)) for a, n in zip(starts, shape, strict=True))


@pytest.mark.parametrize("block_bytes", [2**20, 64])
def test_every_part_of_every_layout(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(stored, "_BLOCK_BYTES", block_bytes)
    tensors, file = _tensors(), tmp_path / "x.pt"
    torch.save(tensors, file)
    pieces = file_pieces(load_pickle(file), file, "x")
    for name, tensor in tensors.items():
        piece = pieces[name]
        assert isinstance(piece, FilePiece), name
        assert torch.equal(whole(piece), tensor), name
        for box in _boxes(tensor.shape):
            part = piece.read_box(box)
            assert part.is_contiguous()
            assert torch.equal(part, tensor[tuple(slice(*b) for b in box)]), (name, box)


def test_files_of_before_version_1_6_are_held(tmp_path):
    tensors, file = _tensors(), tmp_path / "x.pt"
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    pieces = file_pieces(load_pickle(file), file, "x")
    for name, tensor in tensors.items():
        assert isinstance(pieces[name], HeldPiece)
        assert torch.equal(whole(pieces[name]), tensor), name


@pytest.mark.parametrize("dim", [0, 1])
def test_pieces_one_after_the_other(dim):
    parts = [torch.randn(3, 4) for _ in range(3)]
    tensor, full = joined([HeldPiece(part) for part in parts], dim), torch.cat(parts, dim)
    assert tensor.shape == full.shape
    assert torch.equal(tensor.read(), full)
    for box in _boxes(full.shape):
        part = tensor.read_box(box)
        assert torch.equal(part, full[tuple(slice(*b) for b in box)])
        assert part.untyped_storage().nbytes() == part.numel() * 4  # nobody else's memory


@pytest.mark.parametrize(("inner", "outer"), [((3, 4), (1, 3, 4)), ((1, 3, 4), (3, 4))])
def test_dimensions_of_one(inner, outer):
    tensor = torch.randn(inner)
    piece = FoldedPiece(HeldPiece(tensor), outer)
    for box in _boxes(outer):
        expected = tensor.reshape(outer)[tuple(slice(*b) for b in box)]
        if expected.numel():
            assert torch.equal(piece.read_box(box), expected)


def test_a_torch_file_inside_of_another(tmp_path):
    tensor, file = torch.randn(5, 6), tmp_path / "x.distcp"
    with file.open("wb") as stream:
        stream.write(b"before")
        torch.save(tensor[1:4], stream)
        end = stream.tell()
        stream.write(b"after")
    piece = embedded_piece(file, 6, end - 6, "x")
    assert isinstance(piece, FilePiece)
    assert torch.equal(whole(piece), tensor[1:4])
    with pytest.raises(CheckpointError, match="x: "):
        embedded_piece(file, 7, end - 7, "x")
    with pytest.raises(CheckpointError, match="but the file has"):
        embedded_piece(file, 6, end + 100, "x")


def test_a_file_that_was_cut_off_since(tmp_path):
    file = tmp_path / "x.pt"
    torch.save({"a": torch.ones(1000)}, file)
    (piece,) = file_pieces(load_pickle(file), file, "x").values()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="x: the file is truncated"):
        whole(piece)
