"""What a trained model is worth: held-out loss, decoding, problems that its code solves."""
