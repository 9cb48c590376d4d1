"""Decode pictures in your own programs and notebooks: the public names of `data_pipeline.content.images`."""

from data_pipeline.common.errors import BadSample
from data_pipeline.content.images import check_size, decode, dimensions, orientation_from_json, training_pair

__all__ = ["BadSample", "check_size", "decode", "dimensions", "orientation_from_json", "training_pair"]
