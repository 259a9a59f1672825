"""Megatron-BERT and original BERT as one encoder on packed tokens, with its heads."""
