"""What denoising follows: prompts, a LoRA, a depth image."""
