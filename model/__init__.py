"""The multi-token prediction model: trunk, heads, losses, decoding.

The modules here build the model that is trained, on megatron-core; `model.hugging_face` stores and
reads it; `model.decoding` computes the same from an export, in plain torch, with a cache;
`model.generate` is the command on top.
"""
