"""A YAML file with the options of a build: the command line's names with _ for -, and sources.

    output: data/corpus
    tokenizer: train:32000
    sources:
      - {name: web, input: ["raw/web/*.jsonl"], weight: 3}
      - {name: code, input: "${CODE_ROOT}", glob: ["*.py", "*.c"], weight: 1}

Relative paths start at the current folder. In paths, ${NAME} is an environment variable, *, ? and
[ ] stand for every match in sorted order, and python:stdlib is the interpreter's own library.
"""

import dataclasses
import difflib
import glob
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from data_prep.building.options import BuildOptions, Source
from data_prep.errors import DataError, shown
from foundation.yaml_text import YamlError, read_yaml

_YAML_NAMES = {"inputs": "input", "globs": "glob"}
_FIELD_NAMES = {name: field for field, name in _YAML_NAMES.items()}
_LISTS = ("input", "glob", "exclude")
_PATHS = ("input", "output", "tokenizer", "chat_template")
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def read_config(path: Path) -> dict[str, Any]:
    """The options that a YAML file gives, as arguments of `BuildOptions`.

    Raises:
        DataError: The file cannot be read, or naming all that is wrong with it, one line each.
    """
    try:
        content = read_yaml(path)
    except OSError as error:
        raise DataError(f"--config {shown(path)} cannot be read: {error.strerror}") from error
    except YamlError as error:
        raise DataError(f"--config {shown(path)} is not valid YAML: {error}") from error
    except ValueError as error:  # of a name with NUL in it
        raise DataError(f"--config {shown(path)} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"--config {path} holds no keys; write for example output: data/corpus")
    problems: list[str] = []
    expanded = _expand(content, problems)
    options: BaseModel | None = None
    try:
        options = _CONFIG.model_validate_json(json.dumps(expanded, default=str), strict=True)
    except ValidationError as error:
        problems += _describe(error)
    if problems or options is None:
        raise DataError("\n".join(f"{path}: {problem}" for problem in problems))
    given = _given(options)
    if sources := getattr(options, "sources", None):
        given["sources"] = tuple(Source(**_given(source)) for source in sources)
    return given


def _given(model: BaseModel) -> dict[str, Any]:
    """The values that were written down, under their names in Python."""
    values = ((name, getattr(model, name)) for name in model.model_fields_set)
    return {_FIELD_NAMES.get(name, name): value for name, value in values if value is not None}


def _model(options: type, **replaced: Any) -> type[BaseModel]:
    """A dataclass of options as a model in which every key may be left out."""
    hints = get_type_hints(options)
    fields = {
        _YAML_NAMES.get(field.name, field.name): (
            replaced.get(field.name, hints[field.name]) | None,
            None,
        )
        for field in dataclasses.fields(options)
    }
    model: type[BaseModel] = create_model(
        options.__name__, __config__=ConfigDict(extra="forbid"), **fields
    )  # type: ignore[call-overload]
    return model


def _expand(content: Mapping[str, Any], problems: list[str], where: str = "") -> dict[str, Any]:
    """Single words as lists where lists are meant, and paths as they are on this machine."""
    expanded: dict[str, Any] = {}
    for key, value in content.items():
        if key == "sources" and isinstance(value, list) and not where:
            expanded[key] = [
                _expand(source, problems, f"sources[{number}].")
                if isinstance(source, dict)
                else source
                for number, source in enumerate(value)
            ]
            continue
        if key in _LISTS and isinstance(value, str):
            value = [value]
        if key in _PATHS and isinstance(value, str):
            value = _fill_in(value, f"{where}{key}", problems)
        elif key == "input" and isinstance(value, list):
            value = [
                found
                for text in value
                for found in (
                    _matches(_fill_in(text, f"{where}{key}", problems), where + key, problems)
                    if isinstance(text, str)
                    else [text]
                )
            ]
        expanded[str(key)] = value
    for name in ("name", "input"):
        if where and name not in content:
            problems.append(f"{where}{name} is missing; every source has a name and an input")
    return expanded


def _fill_in(text: str, key: str, problems: list[str]) -> str:
    """A path with its environment variables and ~ replaced."""
    for name in _VARIABLE.findall(text):
        if name not in os.environ:
            problems.append(f"{key}={text}: the environment has no {name}; export it")
    filled = _VARIABLE.sub(lambda found: os.environ.get(found[1], found[0]), text)
    return os.path.expanduser(filled)


def _matches(text: str, key: str, problems: list[str]) -> Iterator[str]:
    """The paths that a pattern stands for; a path without signs of a pattern stands for itself."""
    if _VARIABLE.search(text) or not glob.has_magic(text) or os.path.exists(text):
        yield text
        return
    found = sorted(glob.glob(text, recursive=True))
    if not found:
        problems.append(f"{key}={text}: no file matches")
    yield from found


def _describe(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        place = fault["loc"]
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:]
        known = (_SOURCE if place[0] == "sources" else _CONFIG).model_fields
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
            rest = f"nearest: {near[0]}" if near else f"the keys are: {', '.join(known)}"
            yield f"{key} is not a known key; {rest}"
        else:
            value = json.dumps(fault["input"], ensure_ascii=False, default=str)
            yield f"{key}={value[:60]}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


_SOURCE = _model(Source)
_CONFIG = _model(BuildOptions, sources=tuple[_SOURCE, ...])  # type: ignore[valid-type]
