"""Configuration files as users of NeMo 1.0 to 1.4 have them: their model sections, whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpcore.train.read_config import load_config

COMMON = """\
  nemo_path: null
  tokenizer:
    tokenizer_name: ${model.language_model.pretrained_model_name}
    vocab_file: null
    tokenizer_model: null
    special_tokens: null
  language_model:
    pretrained_model_name: megatron-bert-345m-uncased
    lm_checkpoint: null
    config_file: null
    config: null
  optim:
    name: adam
    lr: 5e-5
    betas: [0.9, 0.999]
    weight_decay: 0.00
    sched:
      name: WarmupAnnealing
      warmup_steps: null
      warmup_ratio: 0.1
      last_epoch: -1
      monitor: val_loss
      reduce_on_plateau: false
"""
LOADER = "batch_size: 8, num_samples: -1, num_workers: 2, drop_last: false, pin_memory: false"
FILES = {
    "question_answering": f"""\
  dataset: {{version_2_with_negative: true, doc_stride: 128, max_query_length: 64,
    max_seq_length: 384, max_answer_length: 30, null_score_diff_threshold: 0.0, n_best_size: 20,
    use_cache: true, do_lower_case: true, num_workers: 2, pin_memory: false, drop_last: false}}
  train_ds: {{file: train.json, shuffle: true, {LOADER}}}
  validation_ds: {{file: dev.json, shuffle: false, {LOADER}}}
  test_ds: {{file: null, shuffle: false, {LOADER}}}
  token_classifier: {{num_layers: 1, dropout: 0.0, num_classes: 2, activation: relu,
    log_softmax: false, use_transformer_init: true}}
""",
    "token_classification": f"""\
  label_ids: null
  class_labels: {{class_labels_file: label_ids.csv}}
  dataset: {{data_dir: data, class_balancing: null, max_seq_length: 128, pad_label: 'O',
    ignore_extra_tokens: false, ignore_start_end: false, use_cache: true, num_workers: 2,
    pin_memory: false, drop_last: false}}
  train_ds: {{text_file: text_train.txt, labels_file: labels_train.txt, shuffle: true, {LOADER}}}
  validation_ds: {{text_file: text_dev.txt, labels_file: labels_dev.txt, shuffle: false, {LOADER}}}
  test_ds: {{text_file: null, labels_file: null, shuffle: false, {LOADER}}}
  head: {{num_fc_layers: 2, fc_dropout: 0.5, activation: relu, use_transformer_init: true}}
""",
    "text_classification": f"""\
  class_labels: {{class_labels_file: null}}
  dataset: {{num_classes: 2, do_lower_case: false, max_seq_length: 256, class_balancing: null,
    use_cache: false}}
  train_ds: {{file_path: train.tsv, shuffle: true, {LOADER}}}
  validation_ds: {{file_path: dev.tsv, shuffle: false, {LOADER}}}
  test_ds: {{file_path: null, shuffle: false, {LOADER}}}
  classifier_head: {{num_output_layers: 2, fc_dropout: 0.1}}
  infer_samples: [by the end of no such thing the audience , director]
""",
    "punctuation_capitalization": f"""\
  punct_label_ids: null
  capit_label_ids: null
  class_labels: {{punct_labels_file: punct_label_ids.csv, capit_labels_file: capit_label_ids.csv}}
  dataset: {{data_dir: data, max_seq_length: 128, pad_label: 'O', ignore_extra_tokens: false,
    ignore_start_end: true, use_cache: false, num_workers: 2, pin_memory: false, drop_last: false}}
  train_ds: {{text_file: text_train.txt, labels_file: labels_train.txt, shuffle: true, {LOADER}}}
  validation_ds: {{text_file: text_dev.txt, labels_file: labels_dev.txt, shuffle: false, {LOADER}}}
  punct_head: {{punct_num_fc_layers: 1, fc_dropout: 0.1, activation: relu,
    use_transformer_init: true}}
  capit_head: {{capit_num_fc_layers: 1, fc_dropout: 0.1, activation: relu,
    use_transformer_init: true}}
""",
    "intent_slot_classification": f"""\
  data_dir: data
  class_labels: {{intent_labels_file: intent_labels.csv, slot_labels_file: slot_labels.csv}}
  class_balancing: null
  intent_loss_weight: 0.6
  pad_label: -1
  ignore_extra_tokens: false
  ignore_start_end: true
  train_ds: {{prefix: train, shuffle: true, {LOADER}}}
  validation_ds: {{prefix: test, shuffle: false, {LOADER}}}
  head: {{num_output_layers: 2, fc_dropout: 0.1}}
""",
    "glue": f"""\
  task_name: rte
  supported_tasks: [cola, rte]
  dataset: {{data_dir: glue/RTE, max_seq_length: 128, use_cache: true, num_workers: 2,
    pin_memory: false, drop_last: false}}
  train_ds: {{ds_item: train.tsv, shuffle: true, {LOADER}}}
  validation_ds: {{ds_item: dev.tsv, shuffle: false, {LOADER}}}
""",
}
SOURCES = {
    "question_answering": "train.json",
    "token_classification": ("data/text_train.txt", "data/labels_train.txt"),
    "text_classification": "train.tsv",
    "punctuation_capitalization": ("data/text_train.txt", "data/labels_train.txt"),
    "intent_slot_classification": "data/train.tsv",
    "glue": "glue/RTE/train.tsv",
}


@pytest.mark.parametrize("task", FILES)
def test_model_sections(task: str, tmp_path: Path) -> None:
    path = tmp_path / "nemo.yaml"
    path.write_text(f"task: {task}\nmodel:\n{FILES[task]}{COMMON}")
    notes: list[str] = []
    config = load_config(path, [], notes.append)
    assert config.model.source("train_ds") == SOURCES[task]
    assert config.model.tokenizer.tokenizer_name == "megatron-bert-345m-uncased"
    assert config.model.optim.sched.warmup_ratio == 0.1
    # One line for each key that changes nothing, with its place and the reason.
    assert len(notes) == len(set(notes)) > 10
    assert all(f"{path}:" in note and " changes nothing: " in note for note in notes)
    told = {note.split("=", 1)[0] for note in notes}
    assert {"model.train_ds.num_workers", "model.validation_ds.shuffle"} <= told
    if task == "token_classification":
        assert config.model.labels_file() is None  # NeMo writes label_ids.csv itself
        assert (config.model.dataset.ignore_extra_tokens, config.model.head.fc_dropout) == (
            False,
            0.5,
        )
    if task == "question_answering":
        assert "model.token_classifier.num_layers" in told
