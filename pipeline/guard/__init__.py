"""Steps that would do harm: how they are found, and what follows."""
