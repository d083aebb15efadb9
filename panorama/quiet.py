"""Keeps from a user's log what is not about their picture."""

import logging
from functools import partial

NOISE = {
    "transformers.utils.import_utils": "requires torchvision",
    "transformers.modeling_utils": "new embeddings will be initialized",
    "diffusers.pipelines.stable_diffusion.safety_checker": "A black image will be returned",
}
"""Loggers, and a part of what each says that users can do nothing about."""


def is_wanted(noise: str, record: logging.LogRecord) -> bool:
    """Whether a record is not about `noise`."""
    return noise not in record.getMessage()


def hush_libraries() -> None:
    """Hushes the libraries; to be called before anything that loads a model is imported.

    They advise to install torchvision, which nothing here uses, speak of new tokens and of a black
    picture, which nobody gets, and draw progress bars over files being loaded.
    """
    for name, noise in NOISE.items():
        logging.getLogger(name).addFilter(partial(is_wanted, noise))

    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
