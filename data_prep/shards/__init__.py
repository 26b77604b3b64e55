"""Shard sets on disk: the Arrow files, the manifest, reading and checking them."""
