"""Front end and passes: what to change in a trained latent diffusion model."""

__version__ = "0.1.0"
