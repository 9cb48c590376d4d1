"""Positions to batches: fetching, prefetching and decoding the samples of a run. Imports shards and below."""
