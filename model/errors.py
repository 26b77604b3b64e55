"""Errors that the user can fix; each message names the value, the rule and what to do."""


class ConfigError(Exception):
    """A setting, or a combination of settings, that cannot be run."""


class CheckpointError(Exception):
    """A checkpoint or export folder that is missing, incomplete, damaged or of another run."""


class TrainingError(Exception):
    """Training that cannot continue: the loss is not finite step after step."""


def is_memory_shortage(error: Exception) -> bool:
    """Whether Python or torch, on a CPU or a GPU, had no memory; torch says so in words alone."""
    return isinstance(error, MemoryError) or "memory" in str(error)
