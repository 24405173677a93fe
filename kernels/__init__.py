"""Triton kernels, each with a reference twin in plain PyTorch."""
