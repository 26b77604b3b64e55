"""YAML as this project reads and writes it: numbers as everybody writes them, no repeated keys.

PyYAML follows YAML 1.1, where `3e-4` is text, `off` is false, `012` is ten and of two equal keys
the last wins without a word. Here `3e-4` is a number, only true and false are booleans, numbers
are decimal, and a repeated key is an error.
"""

import re
from typing import Any

import yaml

_MAP_TAG = "tag:yaml.org,2002:map"
_RESOLVERS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the rules of this module."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever _Loader would read as something else."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{key.value}' stands twice in one mapping", key.start_mark
            )
        seen.add(str(key.value))
    return loader.construct_mapping(node, deep=True)


def _without_null_character(first: str) -> list[str]:
    return ["" if letter == "\0" else letter for letter in first]


_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {}
_Loader.add_constructor(_MAP_TAG, _construct_mapping)
for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            _tag, re.compile(rf"^(?:{_pattern})$"), _without_null_character(_first)
        )


def parse_yaml(text: str) -> Any:
    """The value of one YAML document; None when it is empty.

    Raises:
        yaml.YAMLError: The text is not YAML, or repeats a key.
    """
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only


def dump_yaml(value: Any) -> str:
    """YAML text that parse_yaml reads back to the same value; keys keep their order."""
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True
    )


def yaml_fault(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML text, in one line, with its line and column where known."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    parts = [error.problem or error.context or "it cannot be read"]
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + " ".join(" ".join(parts).split())
