"""Index shards in your own programs and notebooks: the public names of `data_pipeline.shards.index`."""

from data_pipeline.shards.index import ShardIndex, index_shard, load_index

__all__ = ["ShardIndex", "index_shard", "load_index"]
