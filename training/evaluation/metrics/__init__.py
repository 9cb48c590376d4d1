"""Metrics of pictures as small pure functions on arrays: no I/O, no config, no distributed code."""
