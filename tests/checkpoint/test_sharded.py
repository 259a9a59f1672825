"""Any module, saved at one size and loaded at another: bits, ties, padding, refusals."""

import json

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from tests.helpers.ranks import run_mesh, run_ranks
from tpcore.checkpoint import CheckpointError, load_sharded, save_sharded, sharded
from tpcore.layers import ColumnParallelLinear, LayerNorm, RowParallelLinear, VocabParallelEmbedding
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.heads import PreTrainingHead
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.sharding import Replicated, ShardedQKV, shard, sharding_table

WORDS = 21
SINGLE = TensorParallelGroup.single()


class FusedQKV(nn.Module):
    """A user's own layer: q, k and v one after the other in the full weight."""

    def __init__(self, tp, hidden):
        super().__init__()
        full = torch.randn(3 * hidden, hidden)
        self.weight = nn.Parameter(shard(full, ShardedQKV(0), tp.rank, tp.size).clone())

    def own_sharding(self):
        return {"weight": ShardedQKV(0)}


class Decoder(nn.Module):
    """Logits by the table of another module, as a plain linear layer that knows no groups."""

    def __init__(self, embedding):
        super().__init__()
        self.weight = embedding.weight


class Tower(nn.Module):
    """Something of everything: ties, padding, buffers, scalars, several dtypes."""

    def __init__(self, tp, hidden=8, dtype=torch.float32):
        super().__init__()
        padded = -(-WORDS // (8 * tp.size)) * 8 * tp.size
        self.embedding = VocabParallelEmbedding(WORDS, hidden, tp=tp, padded_num_embeddings=padded)
        self.qkv = FusedQKV(tp, hidden)
        self.up = ColumnParallelLinear(hidden, 4 * hidden, tp=tp, dtype=dtype)
        self.down = RowParallelLinear(4 * hidden, hidden, tp=tp, dtype=torch.bfloat16)
        self.norm = LayerNorm(hidden)
        self.decoder = Decoder(self.embedding)
        self.register_buffer("steps", torch.tensor(17))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def _tower(tp, seed=5, **kw):
    torch.manual_seed(seed)
    tower = Tower(tp, **kw)
    with torch.no_grad():
        tower.norm.weight.copy_(torch.randn(8))
        tower.down.bias.copy_(torch.randn(8).bfloat16())
        tower.steps += seed
    return tower


def _same_bits(first, second):
    theirs = second.state_dict()
    assert first.state_dict().keys() == theirs.keys()
    for name, tensor in first.state_dict().items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def _check_save(tp, folder):
    save_sharded(_tower(tp), folder, tp=tp)


def _check_load(tp, folder):
    tower = _tower(tp, seed=6)
    load_sharded(tower, folder, tp=tp)
    _same_bits(tower, _tower(tp))
    assert tower.decoder.weight is tower.embedding.weight
    assert torch.rand(1).item() == _next_draw(), "loading draws no random numbers"


def _next_draw():
    _tower(TensorParallelGroup.single(), seed=6)
    _tower(TensorParallelGroup.single())
    return torch.rand(1).item()


@pytest.mark.parametrize("saved", [1, 2, 4])
def test_every_size_loads_what_every_size_saved(tmp_path, saved):
    run_ranks(_check_save, saved, tmp_path / "x")
    for size in (1, 2, 4):
        run_ranks(_check_load, size, tmp_path / "x")
    index = json.loads((tmp_path / "x" / "index.json").read_text())
    assert index["tied"] == {"decoder.weight": "embedding.weight"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def _check_ranks_write_their_own(tp, folder):
    tower = _tower(tp)
    save_sharded(tower, folder, tp=tp)
    own = (folder / f"shard_{tp.rank:02d}_of_{tp.size:02d}.safetensors").stat().st_size
    table = sharding_table(tower)
    del table["decoder.weight"]
    tensors = tower.state_dict()
    expected = sum(
        tensors[name].numel() * tensors[name].element_size()
        for name, sharding in table.items()
        if tp.rank == 0 or not isinstance(sharding, Replicated)
    )
    assert expected <= own < expected + 4096


def test_each_tensor_is_written_once(tmp_path):
    run_ranks(_check_ranks_write_their_own, 2, tmp_path / "x")


def _check_reads(tp, folder):
    opened, safe_open = [], sharded.safe_open
    sharded.safe_open = lambda path, **kw: (
        opened.append(int(path.name[6:8])) or safe_open(path, **kw)
    )
    try:
        load_sharded(_tower(tp, seed=6), folder, tp=tp)
    finally:
        sharded.safe_open = safe_open
    # Replicated tensors are in the first file; blocks of q, k and v lie where the rank's others do.
    own = {2 * tp.rank, 2 * tp.rank + 1} if tp.size == 2 else {tp.rank}
    return sorted(opened), sorted(own | {0})


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_opens_only_the_files_that_it_needs(tmp_path, size):
    run_ranks(_check_save, 4, tmp_path / "x")
    for opened, needed in run_ranks(_check_reads, size, tmp_path / "x"):
        assert opened == needed


VOCABULARY = 1100  # padded to 1152, 1280 and 1536 at sizes 1, 2 and 4


def _bert(tp, seed):
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_layers=1, num_attention_heads=4)
    model = BertModel(config, tp=tp, head=PreTrainingHead(config, tp=tp))
    with torch.no_grad():
        bias = model.head.lm.bias
        first = tp.rank * bias.numel()
        bias.copy_(torch.arange(first, first + bias.numel()).clamp(max=VOCABULARY - 1))
    return model


def _check_bert(tp, folder, write):
    if write:
        save_sharded(_bert(tp, 1), folder, tp=tp)
        return
    model = _bert(tp, 2)
    load_sharded(model, folder, tp=tp)
    _same_bits(model, _bert(tp, 1))


def test_the_encoder_and_its_padded_vocabulary_at_any_size(tmp_path):
    run_ranks(_check_bert, 4, tmp_path / "x", True)
    run_ranks(_check_bert, 1, tmp_path / "x", False)
    run_ranks(_check_bert, 2, tmp_path / "x", False)


class Rows(nn.Module):
    """The same full tensor, split along one dimension or another."""

    def __init__(self, tp, sharding, full):
        super().__init__()
        self.weight = nn.Parameter(shard(full, sharding, tp.rank, tp.size).clone())
        self.sharding = sharding

    def own_sharding(self):
        return {"weight": self.sharding}


def _check_other_sharding(tp, folder, write, saved, loaded):
    full = torch.arange(12.0 * 12).view(12, 12)
    if write:
        save_sharded(Rows(tp, saved, full), folder, tp=tp)
        return
    module = Rows(tp, loaded, torch.zeros(12, 12))
    load_sharded(module, folder, tp=tp)
    assert torch.equal(module.weight, shard(full, loaded, tp.rank, tp.size))


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (ShardedQKV(0), ShardedQKV(1)),
        (ShardedQKV(1), Replicated()),
        (Replicated(), ShardedQKV(0)),
    ],
    ids=str,
)
def test_a_module_may_split_a_tensor_in_another_way(tmp_path, saved, loaded):
    run_ranks(_check_other_sharding, 4, tmp_path / "x", True, saved, loaded)
    run_ranks(_check_other_sharding, 2, tmp_path / "x", False, saved, loaded)


def test_only_the_dtype_of_the_module_counts(tmp_path):
    save_sharded(_tower(SINGLE), tmp_path / "x")
    tower = _tower(SINGLE, seed=6, dtype=torch.bfloat16)
    load_sharded(tower, tmp_path / "x")
    assert torch.equal(tower.up.weight, _tower(SINGLE).up.weight.bfloat16())


# --- refusals


@pytest.fixture
def saved(tmp_path):
    save_sharded(_tower(SINGLE), tmp_path / "x")
    return tmp_path / "x"


def test_names_and_shapes_must_agree(saved):
    tower = _tower(SINGLE)
    tower.extra = nn.Parameter(torch.zeros(2))
    tower.norm = LayerNorm(4, bias=False)
    tower.steps = torch.tensor(1.5)
    before = tower.up.weight.clone()
    with pytest.raises(CheckpointError) as error:
        load_sharded(tower, saved)
    message = str(error.value)
    assert "missing in the folder: extra" in message
    assert "not in the module: norm.bias" in message
    assert "norm.weight is [8] in the folder, [4] in the module" in message
    assert "steps is torch.int64 in the folder, torch.float32 in the module" in message
    assert torch.equal(tower.up.weight, before)


def test_another_vocabulary_is_not_padding(saved):
    tower = _tower(SINGLE)
    tower.embedding = VocabParallelEmbedding(22, 8, tp=SINGLE, padded_num_embeddings=24)
    tower.decoder = Decoder(tower.embedding)
    with pytest.raises(CheckpointError, match=r"\(dim 0: 21 \+ padding\) in the folder, \[24, 8\]"):
        load_sharded(tower, saved)


def test_a_tie_of_the_module_only_is_refused(tmp_path):
    untied = _tower(SINGLE)
    untied.decoder.weight = nn.Parameter(untied.embedding.weight.detach().clone())
    save_sharded(untied, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"are one tensor in the module only"):
        load_sharded(_tower(SINGLE), tmp_path / "x")


def test_a_tie_of_the_folder_fills_both(saved):
    untied = _tower(SINGLE, seed=6)
    untied.decoder.weight = nn.Parameter(torch.zeros(24, 8))
    load_sharded(untied, saved)
    _same_bits(untied, _tower(SINGLE))


def test_damage_is_found(saved):
    file = saved / "shard_00_of_01.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: .* has another checksum"):
        load_sharded(_tower(SINGLE), saved)
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"has {len(content) - 1} bytes; the index says"):
        load_sharded(_tower(SINGLE), saved)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_sharded(_tower(SINGLE), saved)
    (saved / "index.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected a folder that save_sharded wrote"):
        load_sharded(_tower(SINGLE), saved)


NORM = ("tensors", "norm.weight")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("tensor_parallel_size",), 0),
        (("tensor_parallel_size",), "1"),
        (("save",), None),
        (("tied",), []),
        (("tied", "decoder.weight"), "elsewhere"),
        (("files",), None),
        ((*NORM, "shape"), [-8]),
        ((*NORM, "shape"), 8),
        ((*NORM, "dim"), 1),
        ((*NORM, "parts"), 0),
        ((*NORM, "unpadded"), 8),
        ((*NORM, "dtype"), "float33"),
        # Consistent in itself, and another order of the rows:
        (("tensors", "qkv.weight", "parts"), 1),
        (("tensors", "up.weight", "parts"), 2),
        (("tensors", "down.weight", "dim"), 0),
        (("tensors", "embedding.weight", "unpadded"), None),
    ],
)
def test_an_index_that_was_edited_is_refused(saved, keys, value):
    index = json.loads((saved / "index.json").read_text())
    place = index
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (saved / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json is damaged|is of another save"):
        load_sharded(_tower(SINGLE), saved)


def _check_edit_is_refused(tp, folder):
    """At sizes where other parts would give a permuted tensor."""
    with pytest.raises(CheckpointError, match="was edited"):
        load_sharded(_tower(tp), folder, tp=tp)


@pytest.mark.parametrize("size", [1, 2])
def test_other_parts_would_permute_a_tensor_of_two_ranks(tmp_path, size):
    run_ranks(_check_save, 2, tmp_path / "x")
    path = tmp_path / "x" / "index.json"
    index = json.loads(path.read_text())
    assert index["tensors"]["qkv.weight"]["parts"] == 3
    index["tensors"]["qkv.weight"]["parts"] = 1
    path.write_text(json.dumps(index))
    run_ranks(_check_edit_is_refused, size, tmp_path / "x")


def test_a_shape_of_the_index_only_is_refused(saved):
    index = json.loads((saved / "index.json").read_text())
    index["tensors"]["norm.weight"]["shape"] = [4]
    (saved / "index.json").write_text(json.dumps(index))
    tower = _tower(SINGLE)
    tower.norm.weight = nn.Parameter(torch.zeros(4))
    with pytest.raises(CheckpointError, match="was edited"):
        load_sharded(tower, saved)


def test_names_inside_a_file_are_part_of_it(saved):
    file = saved / "shard_00_of_01.safetensors"
    content = file.read_bytes()
    for count, old, new in ((1, b"norm.weight", b"norm.xeight"), (1, b"crc32", b"crc33")):
        assert old in content
        file.write_bytes(content.replace(old, new, count))
        with pytest.raises(CheckpointError):
            load_sharded(_tower(SINGLE), saved)


def _check_spread(tp, dp, folder):
    module = fully_shard(nn.Linear(4, 4), mesh=dp.device_mesh("cpu"))
    for function in (save_sharded, load_sharded):
        with pytest.raises(CheckpointError, match=r"weight is spread over .*FSDP2"):
            function(module, folder, tp=tp)


def test_parameters_of_fsdp2_are_refused(saved):
    run_mesh(_check_spread, 1, 2, saved)


def test_files_of_two_saves_do_not_mix(saved, tmp_path):
    save_sharded(_tower(SINGLE, seed=9), tmp_path / "y")
    name = "shard_00_of_01.safetensors"
    (tmp_path / "y" / name).replace(saved / name)
    # Checksums of fewer digits make a smaller file, which shows first.
    with pytest.raises(CheckpointError, match=r"is of another save|bytes; the index says"):
        load_sharded(_tower(SINGLE), saved)


def test_only_its_own_kind_is_overwritten(saved, tmp_path):
    with pytest.raises(CheckpointError, match="exists already"):
        save_sharded(_tower(SINGLE), saved)
    save_sharded(_tower(SINGLE, seed=7), saved, overwrite=True)
    tower = _tower(SINGLE)
    load_sharded(tower, saved)
    _same_bits(tower, _tower(SINGLE, seed=7))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("...")
    with pytest.raises(CheckpointError, match="expected a folder that save_sharded wrote"):
        save_sharded(_tower(SINGLE), tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "..."


def _check_failing_rank(tp, folder):
    tower, save_file = _tower(tp), sharded.save_file
    if tp.rank == 1:
        sharded.save_file = _full_disk
    message = "No space left" if tp.rank == 1 else "another rank could not write its part"
    try:
        with pytest.raises(CheckpointError, match=message):
            save_sharded(tower, folder, tp=tp, overwrite=folder.exists())
    finally:
        sharded.save_file = save_file


def _full_disk(*_):
    raise OSError(28, "No space left on device")


def test_a_rank_that_cannot_write_leaves_things_as_they_were(tmp_path):
    run_ranks(_check_failing_rank, 2, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    save_sharded(_tower(SINGLE, seed=7), tmp_path / "x")
    run_ranks(_check_failing_rank, 2, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    tower = _tower(SINGLE)
    load_sharded(tower, tmp_path / "x")
    _same_bits(tower, _tower(SINGLE, seed=7))


def test_what_is_no_tensor_is_refused(tmp_path):
    class Stateful(nn.Module):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(CheckpointError, match="_extra_state is a dict; only tensors"):
        save_sharded(Stateful(), tmp_path / "x")
    with pytest.raises(CheckpointError, match="weight is on the meta device"):
        save_sharded(nn.Linear(2, 2, device="meta"), tmp_path / "x")
