"""Errors that the user can fix; each message names the value, the rule and what to do."""


class ConfigError(Exception):
    """A setting, or a combination of settings, that cannot be run."""


class CheckpointError(Exception):
    """A checkpoint or export folder that is missing, incomplete, damaged or of another run."""


class TrainingError(Exception):
    """Training that cannot continue: the loss is not finite step after step."""
