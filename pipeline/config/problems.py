"""Configuration problems in plain words: the value, the rule, what to do, one line each."""

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from pydantic import ValidationError

from foundation.shown_text import printable

_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "is_instance_of": "a path as text",
    "finite_number": "a finite number",
    "model_type": "a mapping of keys",
}
_SHOWN, _LONGEST_KEY, _LONGEST_LINE = 60, 80, 1500  # letters
MOST_PROBLEMS = 50  # nobody reads more before mending these
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
# A default that is derived from another key cannot be formed when that key is itself at fault.
_CONSEQUENCES = {"default_factory_not_called"}


def plain_problems(section: str, error: ValidationError, known_keys: Collection[str]) -> list[str]:
    """What is wrong with one section of a run configuration, one line per problem.

    Args:
        section: Name of the section, put in front of its keys.
        error: What pydantic found in it.
        known_keys: Every key of a run, as `section.key`.
    """
    problems: list[str] = []
    for fault in error.errors()[:MOST_PROBLEMS]:
        if fault["type"] in _CONSEQUENCES:
            continue
        key = _dotted(section, fault["loc"])
        if fault["type"] == "value_error":
            lines = str(fault["ctx"]["error"]).splitlines()
            problems += [f"{section}.{printable(line, _LONGEST_LINE)}" for line in lines]
        elif fault["type"] in {"extra_forbidden", "invalid_key"}:
            path = ".".join([section, *map(_key_text, fault["loc"])])
            problems.append(unknown_key(path, known_keys))
        else:
            problems.append(_one_value(key, fault["type"], fault["input"], fault.get("ctx", {})))
    return problems


def listed(problems: Sequence[str]) -> str:
    """Problems as one text: the only one, or their number and the first of them, a line each."""
    if len(problems) == 1:
        return problems[0]
    count = f"{len(problems)} problems"
    if len(problems) > MOST_PROBLEMS:
        count += f", of which these are the first {MOST_PROBLEMS}"
    return "\n  - ".join([count, *problems[:MOST_PROBLEMS]])


def unknown_key(key: str, known_keys: Collection[str]) -> str:
    """The line that refuses a key, with the known keys it may have meant."""
    key = _key_text(key)
    likely = nearest_keys(key, known_keys)
    if likely:
        return f"{key} is not a known key; nearest: {' or '.join(likely)}"
    section = key.partition(".")[0]
    sections = dict.fromkeys(name.partition(".")[0] for name in known_keys)
    siblings = [name for name in known_keys if name.startswith(f"{section}.")]
    if not siblings and (near := difflib.get_close_matches(section, sections, n=1)):
        return f"{key} is not a known key; nearest: {near[0]}"
    if siblings:
        return f"{key} is not a known key; {section} has: {', '.join(siblings)}"
    return f"{key} is not a known key; the sections are: {', '.join(sections)}"


def nearest_keys(key: str, known_keys: Collection[str]) -> list[str]:
    """Known keys that `key` may have meant, best first; empty when nothing is near."""
    last = key.rpartition(".")[2]
    same_last = [name for name in known_keys if name.rpartition(".")[2] == last]
    if same_last:
        return same_last
    candidates = difflib.get_close_matches(key, known_keys, n=1, cutoff=0.75)
    if candidates:
        return candidates
    by_last = {name.rpartition(".")[2]: name for name in known_keys}
    return [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]


def shown(value: object) -> str:
    """A value as a person would write it in YAML, shortened when long."""
    if isinstance(value, PurePath):
        value = str(value)
    text = json.dumps(value, default=str, ensure_ascii=False)
    return printable(text, _SHOWN)


def _key_text(key: int | str) -> str:
    """A key as it was given, shortened when long."""
    return printable(str(key), _LONGEST_KEY)


def _dotted(section: str, location: Sequence[int | str]) -> str:
    path = section
    for part in location:
        if isinstance(part, str) and part.startswith("<"):
            continue  # which form of a value this is, no key
        path += f"[{part}]" if isinstance(part, int) else f".{_key_text(part)}"
    return path


def _one_value(key: str, kind: str, value: object, context: Mapping[str, Any]) -> str:
    setting = f"{key}={shown(value)}"
    if kind == "not_printable":
        return f"{setting} holds a control character, which no name or path may; leave it out"
    if kind == "path_too_long":
        return f"{setting} is longer than a path or a name in it may be; give a shorter one"
    if kind == "missing" and key.endswith("]"):
        return f"{key} is missing: the list is too short; give every value of it"
    if kind == "missing" and key.count(".") > 1:
        return f"{key} is missing and has no default; add it to the YAML"
    if kind == "missing":
        return f"{key} is missing and has no default; add it to the YAML or pass --set {key}=VALUE"
    if kind == "too_long":
        limit = context["max_length"]
        return f"{setting} has {context['actual_length']} values, must have {limit}; drop the rest"
    if kind == "literal_error":
        return f"{setting} is not a choice; use one of: {context['expected'].replace(chr(39), '')}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{setting} must be {words} {context[name]}; change it to such a value"
    if kind in _WANTED:
        return f"{setting} is {_kind_of(value)}, must be {_WANTED[kind]}{_rewrite(kind, value)}"
    return f"{setting} is not usable ({kind}); see the list of keys in the documentation"


def _kind_of(value: object) -> str:
    if value is None:
        return "empty"
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return "not finite"
    for kind, words in (
        (bool, "true/false"),
        (int, "a whole number"),
        (float, "a decimal number"),
        (str, "text"),
        (Mapping, "a mapping"),
        (Sequence, "a list"),
    ):
        if isinstance(value, kind):
            return words
    return f"a {type(value).__name__}"


def _rewrite(kind: str, value: object) -> str:
    """What to write instead of a wrong type, where the value shows what was meant."""
    if kind in {"int_type", "float_type"} and isinstance(value, str):
        number = value.strip().replace("_", "").removeprefix("-")
        if number.isdecimal():
            return f"; write {value.strip()} without quotes"
    if kind == "int_type" and isinstance(value, float) and abs(value) < 1e15 and value % 1 == 0:
        return f"; write {int(value)}"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; put it in quotes"
    if kind == "tuple_type":
        return "; write it as [a, b]"
    if value is None:
        return "; give it a value, or remove the line to use the default if it has one"
    return f"; change it to {_WANTED[kind]}"
