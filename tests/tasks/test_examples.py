"""Each configuration of examples/ runs as it is; only encoder, sizes and run folder are set."""

from __future__ import annotations

import filecmp
import math
import shlex
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tpcore import checkpoint
from tpcore.cli import main
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.tokenizer import SPECIAL_TOKENS
from tpcore.train.finetune import finetune
from tpcore.train.read_config import load_config

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MADE = ("intent_slot", "overlap", "punctuation", "relations")
NOT_SHIPPED = {
    "chemprot": [
        f"model.{part}.file_path=examples/relations/{name}.jsonl"
        for part, name in (
            ("train_ds", "train"),
            ("validation_ds", "validation"),
            ("test_ds", "validation"),
        )
    ],
    "glue": ["model.dataset.data_dir={folder}"],
    "sms_spam": [
        f"model.{part}_ds.file_path={{folder}}/{part}.tsv" for part in ("train", "validation")
    ],
}
"""What replaces data that an example gets elsewhere, or makes first."""
CHARACTERS = [c for c in string.printable if c not in string.whitespace + string.ascii_uppercase]
VOCABULARY = (
    *SPECIAL_TOKENS,
    *CHARACTERS,
    *(f"##{c}" for c in string.ascii_lowercase + string.digits),
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """One whose vocabulary spells each word of a data file."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("".join(f"{token}\n" for token in VOCABULARY))
    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, num_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    checkpoint.save(BertModel(config), folder / "megatron", tokenizer_files=[vocabulary])
    return folder / "megatron"


def _replaced(name: str, folder: Path) -> list[str]:
    if name == "sms_spam":
        script = EXAMPLES / "prepare_sms_spam.py"
        subprocess.run([sys.executable, script, folder], check=True, capture_output=True)
    if name == "glue":
        for part in ("train", "dev"):
            rows = [
                f"a {word} film\t{number % 2}" for number, word in enumerate(["bad", "good"] * 8)
            ]
            (folder / f"{part}.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    return [setting.format(folder=folder) for setting in NOT_SHIPPED.get(name, [])]


def _sizes(encoder: Path, folder: Path) -> list[str]:
    parts = ("train_ds", "validation_ds", "test_ds")
    return [
        f"model.language_model.lm_checkpoint={encoder}",
        *(f"model.{part}.num_samples=16" for part in parts),
        "model.train_ds.batch_size=8",
        "trainer.max_epochs=1",
        "trainer.max_steps=2",
        "trainer.peak_tflops=0.05",
        "exp_manager.create_tensorboard_logger=false",
        f"exp_manager.exp_dir={folder}/runs",
    ]


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.yaml")))
def test_each_configuration_runs(name, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [*_sizes(encoder, tmp_path), *_replaced(name, tmp_path)]
    config = load_config(EXAMPLES / f"{name}.yaml", arguments)
    result = finetune(config)
    assert result.last
    assert all(math.isfinite(value) for value in result.last.values())
    monitored = [metric for metric in result.best if metric.startswith("val_")]
    assert monitored
    assert f"`{name}.yaml`" in (EXAMPLES / "README.md").read_text()


def test_the_shell_line_has_the_keys_of_the_nemo_page(encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = (EXAMPLES / "squad_nemo.sh").read_text()
    (line,) = [line for line in text.splitlines() if not line.startswith("#")]
    program, *arguments, rest = shlex.split(line)
    assert (program, rest) == ("tpcore", "$@")
    keys = [argument.split("=")[0] for argument in arguments]
    for key in ("train_ds.file", "validation_ds.file", "language_model.pretrained_model_name"):
        assert f"model.{key}" in keys
    sizes = [
        f"model.language_model.pretrained_model_name={encoder}"
        if setting.startswith("model.language_model.")
        else setting
        for setting in _sizes(encoder, tmp_path)
    ]
    assert main([*arguments, *sizes]) == 0
    assert "val_exact_match" in capsys.readouterr().out


@pytest.mark.parametrize("name", MADE)
def test_small_data_are_what_their_program_makes(name, tmp_path):
    script = EXAMPLES / "make_small_data.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    made = sorted(path.name for path in (tmp_path / name).iterdir())
    shipped = {path.name for path in (EXAMPLES / name).iterdir()}
    assert shipped == {*made, "README.md"}
    assert filecmp.cmpfiles(tmp_path / name, EXAMPLES / name, made, shallow=False)[0] == made
