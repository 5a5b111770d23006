"""Number formats, the grids of activations, and what quantized layers compute in PyTorch."""
