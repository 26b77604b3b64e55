"""The data of a run: samples, mixture, batch order, validation."""
