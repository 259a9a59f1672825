# NeMo's command for SQuAD with its own key names, on the questions beside this; more keys may follow.
# The released encoder is downloaded once: several hundred megabytes.
tpcore finetune task=question_answering model.train_ds.file=examples/squad/train-v2.0.json model.validation_ds.file=examples/squad/dev-v2.0.json model.dataset.version_2_with_negative=true model.language_model.pretrained_model_name=megatron-bert-345m-uncased "$@"
