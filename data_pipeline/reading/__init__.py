"""From positions to batches: fetches, prefetches and decodes the samples of a run. Imports shards and below."""
