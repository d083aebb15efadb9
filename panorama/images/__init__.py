"""From latents to an image, its safety check and its file."""
