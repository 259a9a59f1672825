"""The verbs: load at any size, save from any size, nothing half-written, clear refusals."""

import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch

from tests.checkpoint import golden, tiny
from tests.helpers.ranks import run_ranks
from tpcore import checkpoint
from tpcore.checkpoint import CheckpointError, CheckpointInfo, stored, torch_file
from tpcore.parallel.sharding import shard

PRETRAINED = golden.COMMITTED / "ckptv1.0_tp2" / "ckpt"
BERT = golden.COMMITTED / "hf_bert_pretraining" / "model"
CLASSIFIER = golden.COMMITTED / "hf_megatron_bert_seqcls" / "model"


def _same_parameters(first, second):
    theirs = second.state_dict()
    assert first.state_dict().keys() == theirs.keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


# --- loading -------------------------------------------------------------------------------------


def _check_shards(tp, path):
    """Every rank holds its own slice of what one process holds, and nothing of the rest."""
    whole = checkpoint.load(path, vocab_size=1000)
    model = checkpoint.load(path, tp=tp, vocab_size=1000)
    table = model.sharding_table()
    for name, tensor in whole.state_dict().items():
        piece = model.state_dict()[name]
        assert torch.equal(piece, shard(tensor, table[name], tp.rank, tp.size)), name
        assert piece.untyped_storage().nbytes() == piece.numel() * piece.element_size(), name
        assert piece.requires_grad == tensor.requires_grad


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_hold_shards_of_the_same_model(size):
    run_ranks(_check_shards, size, PRETRAINED)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float64])
def test_dtype(dtype):
    model = checkpoint.load(PRETRAINED, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.get_default_dtype()}
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_loading_draws_no_random_numbers():
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    checkpoint.load(PRETRAINED)
    assert torch.equal(torch.randn(4), expected)


def test_auto_builds_what_the_file_holds():
    assert checkpoint.load(PRETRAINED).head.binary is not None
    assert checkpoint.load(CLASSIFIER).head.classifier.out_features == 5
    assert checkpoint.load(golden.COMMITTED / "v1.0_tp1/ckpt").pooler is not None


def test_none_leaves_the_head_out_and_keeps_the_pooler():
    model = checkpoint.load(PRETRAINED, head=None)
    assert model.head is None
    assert model.pooler is not None


def test_a_new_head_is_named_in_one_line(caplog):
    with caplog.at_level(logging.INFO, logger="tpcore.checkpoint"):
        model = checkpoint.load(PRETRAINED, head="sequence_classification", num_labels=2)
    assert model.head.classifier.out_features == 2
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line.endswith("new, not in the file: head.classifier.weight, head.classifier.bias")
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert "not used: head.lm.dense.weight" in line
    for name, tensor in checkpoint.load(PRETRAINED, head=None).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    weight = model.head.classifier.weight
    assert 0 < weight.std() < 1
    assert not weight.is_meta


def test_equal_seeds_give_equal_new_heads():
    heads = []
    for _ in range(2):
        torch.manual_seed(7)
        model = checkpoint.load(PRETRAINED, head="token_classification", num_labels=3)
        heads.append(model.head.classifier.weight)
    assert torch.equal(*heads)


def test_a_file_without_a_pooler_gets_one_only_with_a_head_that_needs_it(tmp_path, caplog):
    checkpoint.convert(PRETRAINED, tmp_path / "x", to="huggingface")
    encoder = checkpoint.load(tmp_path / "x", head=None, add_pooler=False)
    checkpoint.save(encoder, tmp_path / "bare")
    assert checkpoint.load(tmp_path / "bare").pooler is None
    assert checkpoint.load(tmp_path / "bare", head="question_answering").pooler is None
    assert not checkpoint.inspect(tmp_path / "bare").config.add_pooler
    caplog.clear()
    model = checkpoint.load(tmp_path / "bare", head="sequence_classification", num_labels=2)
    assert model.pooler is not None
    assert "pooler.dense.weight" in caplog.text
    assert "head.classifier.bias" in caplog.text


def test_a_head_without_the_pooler_it_was_trained_with_is_refused():
    with pytest.raises(CheckpointError, match=r"missing parameters: pooler\.dense\.weight"):
        checkpoint.load(CLASSIFIER, add_pooler=False)
    assert checkpoint.load(CLASSIFIER, add_pooler=False, head=None).pooler is None


def test_head_arguments_reach_the_head():
    model = checkpoint.load(
        PRETRAINED,
        head="sequence_classification",
        num_labels=1,
        head_kwargs={"regression": True, "dropout": 0.5},
    )
    assert model.head.regression
    assert model.head.dropout.p == 0.5


def test_overrides_reach_the_config():
    model = checkpoint.load(
        PRETRAINED, hidden_dropout=0.3, attention_dropout=0.2, gelu="tanh", vocab_size=1000
    )
    config = model.config
    assert (config.hidden_dropout, config.attention_dropout) == (0.3, 0.2)
    # Megatron's fused tanh never reached the LM head, so the one does not move the other.
    assert (config.gelu, config.lm_head_gelu) == ("tanh", "none")
    assert (config.vocab_size, config.padded_vocab_size) == (1000, 1024)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"head": "classification"}, "head='classification' is unknown; use one of pretraining"),
        ({"head": "sequence_classification"}, r"needs num_labels=\.\.\."),
        ({"head": None, "num_labels": 2}, "need a head"),
        ({"head": "pretraining", "head_kwargs": {"binary": False}}, "binary=False was asked for"),
        ({"head": "token_classification", "num_labels": 2, "head_kwargs": {"x": 1}}, "x"),
        ({"hidden_dropuot": 0.1}, "did you mean hidden_dropout?"),
        ({"hidden_dropout": 2.0}, r"hidden_dropout=2\.0 is not a probability"),
        ({"layernorm_eps": "a"}, "layernorm_eps='a' is not positive"),
        ({"num_layers": 2}, r"blocks\.2\.input_norm\.weight"),
        ({"max_position_embeddings": 512}, r"position_embeddings\.weight has shape \[64, 64\]"),
        ({"num_attention_heads": 8}, "written with 4"),
        ({"vocab_size": 30522}, "the vocabulary belongs to another model"),
        ({"qkv_layout": "v9"}, "qkv_layout='v9' is unknown"),
    ],
)
def test_requests_that_the_file_contradicts(kwargs, message):
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(PRETRAINED, **kwargs)
    assert "\n" not in str(error.value)


def test_other_requests_that_cannot_be_met(tmp_path):
    with pytest.raises(CheckpointError, match=r"num_labels=2 .* has 5"):
        checkpoint.load(CLASSIFIER, num_labels=2)
    with pytest.raises(CheckpointError, match="no meaning for a Hugging Face folder"):
        checkpoint.load(BERT, qkv_layout="v0")
    with pytest.raises(CheckpointError, match="no such file or directory"):
        checkpoint.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no checkpoint is recognised there"):
        checkpoint.load(tmp_path)
    shutil.copy(BERT / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"weights, but no config\.json beside them"):
        checkpoint.load(tmp_path)
    checkpoint.save(checkpoint.load(PRETRAINED, head=None), tmp_path / "bare")
    with pytest.raises(CheckpointError, match="holds no head"):
        checkpoint.load(tmp_path / "bare", num_labels=2)


def _check_size_refused(tp, path):
    with pytest.raises(CheckpointError, match=r"num_attention_heads=2 .* size of 4; use 1 or 2"):
        checkpoint.load(path, tp=tp)


def test_a_size_that_does_not_divide_the_heads(tmp_path):
    args = tiny.args_of(3, 1, num_attention_heads=2)
    path = tiny.write_megatron(tmp_path, tiny.random_model(), args=args)
    run_ranks(_check_size_refused, 4, path)


def test_a_damaged_tensor_is_noticed(tmp_path):
    root = tiny.write_megatron(tmp_path / "x", tiny.random_model(), tp=2)
    file = root / "iter_0000010/mp_rank_01/model_optim_rng.pt"
    tensor = tiny.random_model()["blocks.0.mlp.dense_out.weight"].chunk(2, 1)[1]
    content = bytearray(file.read_bytes())
    start = content.find(tensor.contiguous().numpy().tobytes())
    content[start + 16 : start + 80] = bytes(64)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"mp_rank_01/.* is damaged: .*/data/\d+ differs"):
        checkpoint.convert(root, tmp_path / "y", to="megatron")
    with pytest.raises(CheckpointError, match=r"mp_rank_01/.* is damaged"):
        checkpoint.load(root)


def test_a_file_without_checksums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        root = tiny.write_megatron(tmp_path / "x", tiny.random_model())
    finally:
        torch.serialization.set_crc32_options(before)
    checkpoint.load(root)


# --- inspecting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("item", golden.committed(), ids=lambda item: item.name)
def test_inspect_says_it_in_words_and_in_json(item):
    info = checkpoint.inspect(item.checkpoint)
    values = json.loads(json.dumps(info.to_dict()))
    assert values["config"]["hidden_size"] == 64
    assert values["num_parameters"] == info.num_parameters
    assert values["possible_tensor_parallel_sizes"] == [1, 2, 4]
    text = str(info)
    for entry in info.parameters:
        assert entry.name in text
    assert info.format in text
    assert f"{info.config.layernorm_eps}" in text
    shardings = {entry.name: entry.sharding for entry in info.parameters}
    assert shardings["blocks.0.attention.qkv.weight"] == "rows"
    assert shardings["blocks.0.attention.dense.weight"] == "columns"
    assert shardings["final_norm.weight"] == "replicated"


def test_inspect_reads_no_tensors(monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(stored.FilePiece, "read_box", read)
    with pytest.raises(AssertionError, match="a tensor was read"):
        checkpoint.load(PRETRAINED)
    assert isinstance(checkpoint.inspect(PRETRAINED), CheckpointInfo)


# --- saving --------------------------------------------------------------------------------------


def _check_saved_and_loaded(tp, source, folder):
    model = checkpoint.load(source, tp=tp)
    for format, size in (
        ("megatron", None),
        ("megatron", 1),
        ("megatron", 4),
        ("huggingface", None),
    ):
        path = folder / f"{tp.size}-{format}-{size}"
        checkpoint.save(model, path, format=format, tensor_parallel_size=size)
        again = checkpoint.load(path, tp=tp)
        _same_parameters(model, again)
        info = checkpoint.inspect(path)
        if format == "megatron":
            assert info.tensor_parallel_size == (size or tp.size)
    assert not [child for child in folder.iterdir() if child.name.startswith(".")]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("source", [CLASSIFIER, BERT], ids=["classifier", "pretraining"])
def test_models_are_saved_at_any_size_from_any_size(tmp_path, source, size):
    run_ranks(_check_saved_and_loaded, size, source, tmp_path)


def test_a_saved_model_says_what_it_was_given(tmp_path):
    model = checkpoint.load(CLASSIFIER)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n")
    labels = ["a", "b", "c", "d", "e"]
    checkpoint.save(
        model, tmp_path / "x", iteration=1200, labels=labels, tokenizer_files=[vocabulary]
    )
    info = checkpoint.inspect(tmp_path / "x")
    assert (info.iteration, info.labels) == (1200, tuple(labels))
    assert (tmp_path / "x" / "vocab.txt").read_text() == "[PAD]\n"
    assert (tmp_path / "x" / "iter_0001200" / "mp_rank_00").is_dir()


def test_saving_again_needs_overwrite_and_a_checkpoint(tmp_path):
    model = checkpoint.load(CLASSIFIER)
    path = tmp_path / "x"
    path.mkdir()
    checkpoint.save(model, path)
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.save(model, path)
    checkpoint.save(model, path, format="huggingface", overwrite=True)
    assert checkpoint.inspect(path).format.startswith("Hugging Face")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="only a checkpoint is overwritten"):
        checkpoint.save(model, other, overwrite=True)
    assert (other / "thesis.txt").exists()
    file = tmp_path / "file"
    file.write_text("")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"file: (exists|is no checkpoint)"):
            checkpoint.save(model, file, overwrite=overwrite)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["file", "other", "x"]


def test_formats_and_sizes_that_cannot_be_written(tmp_path):
    model = checkpoint.load(CLASSIFIER)
    with pytest.raises(CheckpointError, match="format 'onnx' cannot be written"):
        checkpoint.save(model, tmp_path / "x", format="onnx")
    with pytest.raises(CheckpointError, match="use 1, 2 or 4"):
        checkpoint.save(model, tmp_path / "x", tensor_parallel_size=3)
    with pytest.raises(CheckpointError, match="a Linear cannot be saved"):
        checkpoint.save(torch.nn.Linear(2, 2), tmp_path / "x")
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"no place for: extra\.weight, extra\.bias"):
        checkpoint.save(model, tmp_path / "x")
    del model.extra
    model.head = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="a Linear has no place"):
        checkpoint.save(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


class _DiskFull:
    """Records of torch files are written until some files are complete, then no more."""

    def __init__(self, after=0):
        self.left = after
        self.add = torch_file._add

    def __call__(self, file, name, data):
        self.left -= name == "data.pkl"
        if self.left < 0:
            raise OSError(28, "No space left on device")
        self.add(file, name, data)


def _check_nothing_half_written(tp, source, folder, failing_rank, size, existing):
    model = checkpoint.load(source, tp=tp)
    if existing:
        checkpoint.save(model, folder / "x", tensor_parallel_size=1)
    original = torch_file._add
    if tp.rank == failing_rank:
        torch_file._add = _DiskFull(after=0 if size is None else 1)
    try:
        with pytest.raises(CheckpointError, match=r"No space left|another rank"):
            checkpoint.save(model, folder / "x", tensor_parallel_size=size, overwrite=existing)
    finally:
        torch_file._add = original
    assert (folder / "x").exists() == existing
    assert not (folder / ".x.incomplete").exists()
    assert not (folder / ".x.replaced").exists()
    if existing:
        _same_parameters(model, checkpoint.load(folder / "x", tp=tp))
    checkpoint.save(model, folder / "y")


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(("failing_rank", "size"), [(0, None), (1, None), (0, 4)])
def test_a_rank_that_cannot_write_leaves_nothing_behind(tmp_path, failing_rank, size, existing):
    run_ranks(_check_nothing_half_written, 2, CLASSIFIER, tmp_path, failing_rank, size, existing)


# --- converting ----------------------------------------------------------------------------------


def test_a_failed_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "_add", _DiskFull(after=1))
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left"):
        checkpoint.convert(PRETRAINED, tmp_path / "x", to="megatron", tensor_parallel_size=2)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.convert(PRETRAINED, file / "x", to="megatron")
    assert file.read_text() == ""


def test_a_source_inside_its_destination_is_refused(tmp_path):
    root = tiny.write_megatron(tmp_path / "x", tiny.random_model())
    for source in (root, root / "iter_0000010"):
        with pytest.raises(CheckpointError, match="holds the source"):
            checkpoint.convert(source, root, to="megatron", overwrite=True)
    assert checkpoint.inspect(root).iteration == 10


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_destination_inside_its_source_is_refused(tmp_path, overwrite):
    root = tiny.write_megatron(tmp_path / "x", tiny.random_model(), tp=2)
    (tmp_path / "link").symlink_to(root)
    before = sorted(tmp_path.rglob("*"))
    for source in (root, tmp_path / "link"):
        for destination in (root / "iter_0000010", root / "new", tmp_path / "link" / "new"):
            with pytest.raises(CheckpointError, match="lies inside the source"):
                checkpoint.convert(source, destination, to="megatron", overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before
    _same_parameters(checkpoint.load(root), checkpoint.load(tmp_path / "link"))


def test_a_destination_that_a_link_leads_to_from_the_source_is_refused(tmp_path):
    root = tiny.write_megatron(tmp_path / "x", tiny.random_model())
    (root / "iter_0000010").rename(tmp_path / "weights")
    (root / "iter_0000010").symlink_to(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="holds the source"):
        checkpoint.convert(root, tmp_path / "weights", to="megatron", overwrite=True)
    hugging_face = tmp_path / "hf"
    checkpoint.convert(root, hugging_face, to="huggingface")
    with pytest.raises(CheckpointError, match="lies inside the source"):
        checkpoint.convert(hugging_face / "model.safetensors", hugging_face / "y", to="megatron")
    assert checkpoint.inspect(root).iteration == 10


def test_a_source_where_the_new_folder_is_prepared_is_refused(tmp_path):
    for name in (".x.incomplete", ".x.replaced"):
        root = tiny.write_megatron(tmp_path / name, tiny.random_model())
        with pytest.raises(CheckpointError, match="holds the source"):
            checkpoint.convert(root, tmp_path / "x", to="megatron")
        assert checkpoint.inspect(root).iteration == 10


def test_overrides_and_tokenizer_files_go_into_the_new_checkpoint(tmp_path):
    source = tiny.write_megatron(tmp_path / "a", tiny.random_model())
    (source / "vocab.txt").write_text("[PAD]\n")
    info = checkpoint.convert(
        source, tmp_path / "b", to="huggingface", vocab_size=200, hidden_dropout=0.3
    )
    assert (info.config.vocab_size, info.vocab_rows) == (200, 200)
    assert info.config.hidden_dropout == 0.3
    assert (tmp_path / "b" / "vocab.txt").read_text() == "[PAD]\n"


def test_half_precision_is_kept_by_conversion(tmp_path):
    model = checkpoint.load(CLASSIFIER, dtype=torch.bfloat16)
    checkpoint.save(model, tmp_path / "a", tensor_parallel_size=2)
    info = checkpoint.convert(tmp_path / "a", tmp_path / "b", to="huggingface")
    assert {entry.dtype for entry in info.parameters} == {"bfloat16"}
    _same_parameters(model, checkpoint.load(tmp_path / "b", dtype=torch.bfloat16))


def test_the_package_is_imported_lazily():
    program = "import sys, tpcore.checkpoint; assert 'torch' not in sys.modules; "
    program += "tpcore.checkpoint.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=golden.REPOSITORY)
    with pytest.raises(AttributeError, match="lod"):
        checkpoint.lod  # noqa: B018
