"""The error for input data and shard sets; a message names the value, the rule and what to do."""


class DataError(Exception):
    """Input that cannot be read, or a shard set that cannot be trained on."""


class BadRecordsError(DataError):
    """More records are bad than the limit allows; all others are on disk, and nothing is lost."""
