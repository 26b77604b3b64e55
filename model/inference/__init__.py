"""The model as decoding runs it: plain torch, read straight from an export."""
