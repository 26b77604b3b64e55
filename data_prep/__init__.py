"""Corpora to Arrow shards, and shards to training batches.

The packages import only those before them in this list, and `data_prep.errors`:

    tokenization    text to token ids
    inputs          files of every kind to records
    shards          shard sets on disk
    workers         processes, MPI ranks or array tasks that share the work
    building        corpora to a shard set
    loading         a shard set to batches (nothing from workers or building)

The commands on top (shard, verify, inspect, report, export_megatron) may import all of them.
"""
