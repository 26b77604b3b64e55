"""Values of a parsed record by key."""

from collections.abc import Mapping

MISSING = object()


class FormError(Exception):
    """Why a record gives no document; the text is the reason of its reject."""


def value_at(record: Mapping[str, object], key: str) -> object:
    """The value at the literal key, else below the keys between its dots; MISSING without one."""
    if key in record:
        return record[key]
    value: object = record
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return MISSING
        value = value[name]
    return value


def key_faults(key: str, kind: str = "a string") -> tuple[str, str]:
    """The reasons of records without the key, and of those that hold something else there."""
    return f"no {key!r}", f"{key!r} is not {kind}"
