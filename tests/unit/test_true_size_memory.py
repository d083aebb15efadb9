"""What a sync step of Stable Diffusion 2 base keeps, at its true size."""

from script.true_size import activations


def test_half_of_the_published_loop_a_quarter_with_checkpoints_and_little_when_fast() -> None:
    most = activations()
    loop = most["published loop"]
    assert most["exact"] <= loop / 2
    assert most["exact, checkpointing"] <= loop / 4
    assert most["fast"] <= loop / 10
