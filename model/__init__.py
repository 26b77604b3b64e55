"""The multi-token prediction model: trunk, heads, losses, decoding.

`model.decoding` holds the KV cache and the decoder, which know nothing of the layers; the modules
here build the model on it; `model.hugging_face` stores and reads it; `model.generate` is the
command on top.
"""
