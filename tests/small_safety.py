"""A real safety checker, small and with random weights, that flags what a test wants flagged."""

from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessorPil

SIDE = 32  # pixels of what CLIP sees
ALL, NONE = -1.0, 1.0  # thresholds of a cosine


def save_checker(folder: Path, threshold: float) -> None:
    """Write a checker that flags an image whose cosine with a concept is above a threshold."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    for concepts in (checker.concept_embeds, checker.special_care_embeds):
        concepts.data.normal_()
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(NONE)
    checker.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder)
