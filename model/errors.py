"""Errors that are the user's to mend; each message names the value, the rule and the way out."""


class ConfigError(Exception):
    """A setting, or a combination of settings, that cannot be run."""


class CheckpointError(Exception):
    """A checkpoint or export folder that is missing, incomplete, damaged or of another run."""


class TrainingError(Exception):
    """Training that cannot go on: the loss is not finite step after step."""
