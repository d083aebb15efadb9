"""The memory of a sync step of Stable Diffusion 2 base at its true size."""

from benchmarks.true_size import activations, kept_by_unet


def test_a_step_keeps_less_than_the_published_loop_and_with_checkpointing_a_third() -> None:
    most = activations()
    loop = most["published loop"]
    assert most["exact"] <= loop / 1.3
    assert most["exact, checkpointing"] <= loop / 3
    assert most["fast"] <= loop / 8


def test_the_unet_keeps_little_for_its_gradient_with_checkpointing() -> None:
    kept = kept_by_unet()
    assert kept["frozen"] <= 0.9 * kept["published"]
    assert kept["checkpointing"] <= 0.15 * kept["published"]
