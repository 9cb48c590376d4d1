"""What a tar shard holds: walking, indexing, filtering, summarizing and writing it. Imports content and below."""
