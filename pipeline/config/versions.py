"""Configurations that another version of this project wrote: read where they can be."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from model.errors import ConfigError
from pipeline.config.problems import shown

# Of the files that runs write. To be raised when a key gets another meaning, or when a run must
# not go on without knowing a new one.
CONFIG_VERSION = 1
VERSION_KEY = "version"


def of_this_version(path: str | Path, raw: dict[Any, Any]) -> dict[Any, Any]:
    """The content of a file without its version.

    Files without one were written by a person, or by a run before there were versions; their keys
    are those of version 1.

    Raises:
        ConfigError: it is of a later version, or the version is not a number.
    """
    content = dict(raw)
    version = content.pop(VERSION_KEY, CONFIG_VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ConfigError(
            f"{path}: version={shown(version)} is not the version of a configuration; leave it out"
        )
    if version > CONFIG_VERSION:
        raise ConfigError(
            f"{path} has version {version}, and this Headway reads configurations up to version "
            f"{CONFIG_VERSION}; use the Headway that wrote it, or a later one"
        )
    return content


def leave_out_unknown(
    raw: dict[Any, Any], sections: Mapping[str, type[BaseModel]], always_known: Sequence[str]
) -> list[str]:
    """Take unknown sections and keys out of a configuration.

    Args:
        raw: the sections; changed in place.
        sections: the class of each.
        always_known: sections whose unknown keys stay, to be refused: they may mean another model.

    Returns:
        What was taken out, as `section` or `section.key`.
    """
    left_out = [str(name) for name in raw if name not in sections]
    for name in left_out:
        del raw[name]
    for name, kind in sections.items():
        values = raw.get(name)
        if name in always_known or not isinstance(values, dict):
            continue
        unknown = [key for key in values if key not in kind.model_fields]
        raw[name] = {key: value for key, value in values.items() if key not in unknown}
        left_out += [f"{name}.{key}" for key in unknown]
    return left_out
