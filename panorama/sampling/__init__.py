"""The core: one canvas of latents, denoised through views of it by `sampler.sample`."""
