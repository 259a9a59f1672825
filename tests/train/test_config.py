"""What is read, and that every mistake is one line with the key, its place and the way out."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tpcore.train.config import ConfigError, TrainConfig
from tpcore.train.read_config import describe_keys, load_config, save_config

TASK = "task=text_classification"

YAML = """\
# a comment, so that line numbers differ from key numbers
task: text_classification
model:
  tensor_model_parallel_size: 2
  language_model:
    lm_checkpoint: ckpt
    config: {hidden-size: 64, num_layers: 2}
  train_ds: {file_path: train.tsv, batch_size: 8}
  optim:
    lr: 5e-5
    sched:
      warmup_ratio: 0.1
trainer:
  precision: 32
"""


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_file_then_overrides_over_defaults(tmp_path: Path) -> None:
    config = load_config(
        _file(tmp_path, YAML),
        ["model.train_ds.batch_size=4", "trainer.max_steps=7", "trainer.max_steps=9"],
    )
    assert isinstance(config, TrainConfig)
    assert config.task == "text_classification"
    assert config.model.tensor_model_parallel_size == 2
    assert config.model.language_model.config == {"hidden-size": 64, "num_layers": 2}
    assert config.model.train_ds.file_path == "train.tsv"
    assert config.model.train_ds.batch_size == 4
    assert config.model.optim.lr == 5e-5
    assert config.model.optim.sched.warmup_ratio == 0.1
    assert config.trainer.precision == "32"
    assert config.trainer.max_steps == 9
    assert config.model.optim.betas == [0.9, 0.999]
    assert config.exp_manager.name == "default"


def test_override_values_are_yaml() -> None:
    config = load_config(
        None,
        [
            TASK,
            "model.optim.betas=[0.8, 0.9]",
            "model.language_model.config={hidden_size: 8}",
            "trainer.gradient_clip_val=null",
            "exp_manager.version=3",
            "model.tokenizer.vocab_file=a=b",
        ],
    )
    assert config.model.optim.betas == [0.8, 0.9]
    assert config.model.language_model.config == {"hidden_size": 8}
    assert config.trainer.gradient_clip_val is None
    assert config.exp_manager.version == "3"
    assert config.model.tokenizer.vocab_file == "a=b"


def test_saved_configuration_reads_back(tmp_path: Path) -> None:
    config = load_config(_file(tmp_path, YAML), ["trainer.num_threads=3"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.optm.lr=3", "unknown key model.optm.lr .* did you mean model.optim.lr?"),
        (
            "model.optim.zzz=3",
            "unknown key model.optim.zzz .* known in model.optim: betas, eps, layerwise_lr_decay,",
        ),
        ("optim.lr=3", "did you mean model.optim.lr?"),
        ("modl.optim.lr=3", "did you mean model.optim.lr?"),
        ("trainer.lr=3", "did you mean model.optim.lr?"),
        ("model.optim.shed.name=constant", "did you mean model.optim.sched.name?"),
        ("model.train_ds.file=x", "did you mean model.train_ds.file_path?"),
        ("trainer.max_epoch=3", "did you mean trainer.max_epochs?"),
        ("zzz=1", "unknown key zzz .* exp_manager, model, task, trainer"),
        ("trainer.gpus=2", "trainer.gpus .* --nproc-per-node"),
        ("model.optim.lr=fast", "model.optim.lr .*'fast'.*Float"),
        ("trainer.max_epochs=1.5", "trainer.max_epochs .*1.5.*Integer"),
        ("trainer.max_epochs=true", "trainer.max_epochs .*True.*Integer"),
        ("model.optim=3", "model.optim .* holds keys: model.optim.name"),
        ("exp_manager=null", "exp_manager .* is null, but it holds keys"),
        ("model=null", "holds keys: model.dataset, "),
        ("model.frozen_parameters=blocks.*", "frozen_parameters .*: expected a list, as"),
        ("model.optim.sched.power=.nan", "sched.power=nan .* a positive number"),
        ("model.optim.weight_decay=.inf", "weight_decay=inf .* zero or a positive number"),
        ("trainer.timeout_s=.inf", "timeout_s=inf .* at most 1e6"),
        ('exp_manager.name="a\\nb"', "without control characters"),
        ("model.optim.betas=[0.9]", "model.optim.betas=.* two numbers"),
        ("model.optim.sched.name=CosineAneling", "did you mean CosineAnnealing?"),
        ("trainer.precision=8", "trainer.precision='8'.* one of 32"),
        ("trainer.max_steps=0", "trainer.max_steps=0 .* -1"),
        ("trainer.val_check_interval=1.5", "trainer.val_check_interval=1.5"),
        ("model.train_ds.batch_size=0", "model.train_ds.batch_size=0"),
        ("model.tokenizer.vocab_file=${oc.env:TPCORE_NOT_SET}", "vocab_file.*TPCORE_NOT_SET"),
        ("model.train_ds.file_path=???", "no value for model.train_ds.file_path"),
        (
            "model.language_model.config=[1]",
            r"model.language_model.config .*\[1\]; expected a mapp",
        ),
        ("trainer.seed=18446744073709551616", r"trainer.seed=18446744073709551616 .*2\*\*63"),
        (f"exp_manager.name={'n' * 300}", "exp_manager.name='n+'.*128 bytes"),
        ("exp_manager.name=a/b", "exp_manager.name='a/b'"),
        ("task=text_clasification", "did you mean text_classification?"),
    ],
    ids=lambda value: value.split("=")[0] if "=" in value else "",
)
def test_mistakes_on_the_command_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as caught:
        load_config(None, [TASK, override])
    assert "\n" not in str(caught.value)
    if "=???" not in override:
        assert "(command line)" in str(caught.value)


def test_keys_of_the_trainer_that_change_nothing_get_one_line() -> None:
    notes: list[str] = []
    settings = ["trainer.amp_level=O1", "trainer.logger=false", "trainer.max_epochs=7"]
    config = load_config(None, [TASK, *settings], notes.append)
    assert config.trainer.max_epochs == 7
    assert notes == [
        "trainer.amp_level=O1 (command line) changes nothing: trainer.precision says it all",
        "trainer.logger=False (command line) changes nothing: set "
        "exp_manager.create_tensorboard_logger",
    ]


def test_keys_of_nemo_that_change_nothing_get_one_line(tmp_path: Path) -> None:
    text = "task: text_classification\nmodel:\n  dataset:\n    use_cache: true\n"
    overrides = ["model.train_ds.num_workers=2", "model.validation_ds.shuffle=false"]
    notes: list[str] = []
    config = load_config(_file(tmp_path, text), overrides, notes.append)
    assert config == load_config(None, [TASK])
    assert [note.split(": ", 1)[0] for note in notes] == [
        f"model.dataset.use_cache=True ({tmp_path}/run.yaml:4) changes nothing",
        "model.train_ds.num_workers=2 (command line) changes nothing",
        "model.validation_ds.shuffle=False (command line) changes nothing",
    ]
    assert all("\n" not in note and note.split(": ", 1)[1] for note in notes)


def test_configurations_pickle() -> None:
    config = load_config(None, [TASK, "model.dataset.num_classes=3"])
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("text", ["model.optim.lr", "=3", "--lr"])
def test_override_needs_a_key_and_a_value(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(text)) + ".*key=value"):
        load_config(None, [TASK, text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: text_classification\nmodel:\n  optim:\n    lrr: 3\n", r"run.yaml:4\); did you"),
        ("task: text_classification\nmodel:\n  optim: {lr: x}\n", r"model.optim.lr \(.*:3\)"),
        ("task: text_classification\ntrainer:\n  seed: -1\n", r"trainer.seed=-1 \(.*:3\)"),
        ("model: {}\n", "no value for task .*run.yaml"),
        ("- a\n- b\n", "run.yaml: expected a mapping"),
        ("text\n", "run.yaml: expected a mapping"),
        ("3\n", "run.yaml: expected a mapping"),
        ("task: text_classification\non: x\n", r"run\.yaml:2: the key on is not a text"),
        ("task: text_classification\n3: x\n", r"run\.yaml:2: the key 3 is not a text"),
        ("a: [\n", "run.yaml: not a YAML file"),
        ("{" * 3000, "run.yaml: not a configuration: brackets within"),
        ("task: text_classification\ntask: text_classification\n", "run.yaml.*duplicate key task"),
    ],
)
def test_mistakes_in_a_file_name_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(_file(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_missing_value_can_come_from_an_override(tmp_path: Path) -> None:
    path = _file(tmp_path, 'task: text_classification\nmodel: {train_ds: {file_path: "???"}}\n')
    with pytest.raises(ConfigError, match=r"model\.train_ds\.file_path"):
        load_config(path)
    config = load_config(path, ["model.train_ds.file_path=x.tsv"])
    assert config.model.train_ds.file_path == "x.tsv"


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: .*No such file"):
        load_config(tmp_path / "no.yaml")


def test_every_key_is_documented() -> None:
    described = {key: (default, doc) for key, default, doc in describe_keys("text_classification")}
    assert described["model.optim.lr"] == ("5.0e-05", "Peak learning rate.")
    assert described["model.train_ds.batch_size"] == described["model.test_ds.batch_size"]
    assert "model.validation_ds.shuffle" not in described
    assert all(doc.endswith(".") for _, doc in described.values())


def test_configuration_needs_no_torch() -> None:
    code = "import tpcore.train.read_config, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
