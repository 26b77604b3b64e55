"""What layers compute, without weights: attention, rotation, norm, activation, masks."""
