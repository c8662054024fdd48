"""Layers whose work is fused into few passes over a GPU's memory; Triton's kernels, and the modules that use them."""
