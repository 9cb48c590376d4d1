"""Tar shards: walk, index, filter, summarize and write them. Imports content and below."""
