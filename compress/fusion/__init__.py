"""Fusion: modules of denoisers that call the operators of `kernels` in place of several operations of torch."""
