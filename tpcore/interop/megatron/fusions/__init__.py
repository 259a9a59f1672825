"""The fused functions of Megatron-Core and apex, on tpcore's kernels."""
