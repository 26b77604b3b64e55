"""What every rank of a job must have in common: its configuration, its code and its libraries.

A rank that reads another file than the others would train on, with a loss that is a little off, or
wait in a collective that nobody else calls.
"""

import json
import platform
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Self

import xxhash

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("foundation", "data_prep", "model", "pipeline")
_LIBRARIES = ("torch", "deepspeed", "megatron-core", "numpy", "pyarrow")
_SHOWN = 3
_LONGEST_VALUE = 40  # letters


class Identity(NamedTuple):
    """What one rank runs.

    Attributes:
        host: the name of its node.
        config: every value of the configuration by `section.key`, as JSON.
        code: checksums of source files by path, and versions of libraries by name.
    """

    host: str
    config: dict[str, str]
    code: dict[str, str]

    @classmethod
    def of_this_process(cls, config: Mapping[str, Mapping[str, Any]], **computed: str) -> Self:
        """What this process runs.

        Args:
            config: sections of values.
            computed: what this rank made of values that leave it the choice, by name.
        """
        values = {
            f"{section}.{key}": json.dumps(value, sort_keys=True)
            for section, keys in config.items()
            for key, value in keys.items()
        }
        return cls(socket.gethostname(), values | computed, _code())

    def to_text(self) -> str:
        """As text that goes through a store."""
        return json.dumps(self)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """What `to_text` made."""
        return cls(*json.loads(text))

    def problem(self, rank: str, main: Self) -> str | None:
        """In what this rank differs from rank 0, in one line; None when it does not.

        Args:
            rank: how messages name this rank.
            main: what rank 0 runs.
        """
        who = f"{rank} on {self.host}"
        if differing := _differing(self.config, main.config):
            values = ", ".join(
                f"{key} is {_cut(self.config.get(key))} there and {_cut(main.config.get(key))} "
                "on rank 0"
                for key in differing[:_SHOWN]
            )
            return (
                f"{who} has another configuration than rank 0 on {main.host} ({values}); start all "
                "ranks with one file, on storage that all nodes see, and the same --set"
            )
        if differing := _differing(self.code, main.code):
            more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            return (
                f"{who} runs other code than rank 0 on {main.host} ("
                f"{', '.join(differing[:_SHOWN])}{more} differ); start all ranks from one "
                "installation, or bring both to the same version"
            )
        return None


def _code() -> dict[str, str]:
    files = {
        path.relative_to(_ROOT).as_posix(): xxhash.xxh3_64_hexdigest(path.read_bytes())
        for package in _PACKAGES
        for path in (_ROOT / package).rglob("*.py")
    }
    return files | {"Python": platform.python_version()} | {n: _version(n) for n in _LIBRARIES}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def _differing(mine: Mapping[str, str], main: Mapping[str, str]) -> list[str]:
    return [key for key in sorted({*mine, *main}) if mine.get(key) != main.get(key)]


def _cut(value: str | None) -> str:
    text = "not known" if value is None else value
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
