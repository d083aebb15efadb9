"""Conditions of denoising: prompts, a LoRA, a depth image."""
