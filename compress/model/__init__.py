"""The trained model: diffusers folders read, checked, and held as one LatentDiffusion."""
