"""The attacks of benchmarks/attack, with some of their variants."""

from benchmarks.attack import depth_files, weight_files


def test_no_corrupt_png_is_read_with_other_values() -> None:
    found = depth_files.run(400, seed=1)
    assert sum(sum(counts.values()) for counts in found.values()) == 400
    for name in depth_files.CHECKED:
        assert found[name]["refused"] > 40
        assert found[name]["changed"] == 0, name


def test_a_flipped_byte_of_a_family_stops_its_loading() -> None:
    assert weight_files.run(20, seed=1) == {"stopped": 20, "unnamed": 0, "loaded": 0}
