"""Measure what panoramas cost and how good they are, for `script/` and the tests."""
