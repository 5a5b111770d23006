"""Front end and passes: what to change in a trained latent diffusion model."""
