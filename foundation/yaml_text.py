"""YAML as this project reads and writes it: numbers as everybody writes them, no repeated keys.

PyYAML follows YAML 1.1, where `3e-4` is text, `off` is false, `012` is ten and of two equal keys
the last wins silently. Here `3e-4` is a number, only true and false are booleans, numbers are
decimal, keys are text, and a repeated key is an error.

A file may come from anywhere, so its size, its depth and what its aliases expand to are bounded.
Tags, control characters, lone surrogates and numbers past 64 bits are refused.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 64
_MAX_BYTES = 4 * MAX_CHARACTERS
_TOO_LONG = f"it is longer than {MAX_CHARACTERS:,} characters; is it the right file?"
_VALUE_CHARACTERS = 8  # what a value counts besides its own characters
_SHOWN_CHARACTERS = 40
_MESSAGE_CHARACTERS = 160

_YAML_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT = (_YAML_TAG + name for name in ("null", "bool", "int", "float"))
# What text without quotes is: tag, pattern, and the characters that it may begin with.
_RESOLVERS = (
    (_BOOL, re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    (_INT, re.compile(r"[-+]?(0|[1-9][0-9_]*)"), "-+0123456789"),
    (
        _FLOAT,
        re.compile(
            r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?"
            r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
        ),
        "-+.0123456789",
    ),
    (_NULL, re.compile(r"~|null|Null|NULL|"), "~nN\0"),
)
_INTEGERS = range(-(1 << 63), 1 << 64)
_INTEGER_DIGITS = 20
# Control characters, lone surrogates and what is no character in Unicode.
_NOT_TEXT = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class YamlError(ValueError):
    """What is wrong with a YAML text, in one line, with its line and column where known."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever `parse_yaml` would read as something else."""


_Dumper.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _RESOLVERS:
    _Dumper.add_implicit_resolver(
        _tag,
        re.compile(rf"^(?:{_pattern.pattern})$"),
        ["" if letter == "\0" else letter for letter in _first],
    )


def read_yaml(path: Path) -> Any:
    """The value of a file that holds one YAML document; None when it is empty.

    Raises:
        OSError: The file cannot be read.
        YamlError: It is not YAML as this module reads it.
    """
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)  # the bound also ends files without an end
    if len(content) > _MAX_BYTES:
        raise YamlError(_TOO_LONG)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _place_in(content[: error.start].decode("utf-8-sig"))
        raise YamlError(
            f"{place}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    return parse_yaml(text)


def parse_yaml(text: str) -> Any:
    """The value of one YAML document; None when it is empty.

    Raises:
        YamlError: The text is not YAML as this module reads it.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlError(_TOO_LONG)
    if found := _NOT_TEXT.search(text):
        raise YamlError(f"{_place_in(text[: found.start()])}: {_unprintable(found[0])}")
    loader = yaml.SafeLoader(text)
    try:
        return _Builder(loader).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "it cannot be read"
        raise YamlError(_at(mark, problem)) from None
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError):  # of escapes and directives without sense
        raise YamlError(_at(loader.get_mark(), "it cannot be read")) from None
    finally:
        loader.dispose()


def dump_yaml(value: Any) -> str:
    """YAML text that parse_yaml reads back to the same value; keys keep their order."""
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True
    )


class _Built(NamedTuple):
    """A value with what it counts toward the bounds."""

    value: Any
    size: int = _VALUE_CHARACTERS
    depth: int = 0


class _Open:
    """A list or mapping whose end has not come yet."""

    def __init__(self, event: yaml.CollectionStartEvent) -> None:
        self.anchor: str | None = event.anchor
        self.value: list[Any] | dict[str, Any] = (
            [] if isinstance(event, yaml.SequenceStartEvent) else {}
        )
        self.key: str | None = None  # of a mapping: the key whose value is next
        self.size = _VALUE_CHARACTERS
        self.depth = 1

    @property
    def wants_key(self) -> bool:
        return isinstance(self.value, dict) and self.key is None

    def put(self, built: _Built) -> None:
        if isinstance(self.value, list):
            self.value.append(built.value)
        else:
            assert self.key is not None, "a value without a key"
            self.value[self.key] = built.value
            self.key = None
        self.size += built.size
        self.depth = max(self.depth, built.depth + 1)


class _Builder:
    """Builds plain values from the events of PyYAML's parser.

    It does not recurse, so that no depth of nesting can overflow the stack, and aliases are copied,
    so that what they expand to is counted before anybody walks it.
    """

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self._loader = loader
        self._open: list[_Open] = []
        self._anchors: dict[str, _Built] = {}
        self._size = 0
        self._root: Any = None

    def document(self) -> Any:
        """The value of the only document."""
        documents = 0
        while not self._loader.check_event(yaml.StreamEndEvent):
            event: Any = self._loader.get_event()  # type: ignore[no-untyped-call]
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    _refuse(event, "a second document begins; keep one in the file")
            elif isinstance(event, yaml.NodeEvent):
                self._node(event)
            elif isinstance(event, yaml.CollectionEndEvent):
                done = self._open.pop()
                self._put(event, _Built(done.value, done.size, done.depth), done.anchor)
        return self._root

    def _node(self, event: Any) -> None:
        """A scalar, an alias, or the start of a list or mapping."""
        if getattr(event, "tag", None) is not None:
            tag = event.tag.replace(_YAML_TAG, "!!")
            _refuse(event, f"the tag {_shown(tag, '')} is not read; write the plain value")
        if self._open and self._open[-1].wants_key:
            self._key(self._open[-1], event)
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(self._open) == MAX_DEPTH:
                _refuse(event, f"it is nested deeper than {MAX_DEPTH} levels")
            self._open.append(_Open(event))
        elif isinstance(event, yaml.AliasEvent):
            self._put(event, self._copy_of(event), None)
        else:
            value = _scalar(event)
            size = _VALUE_CHARACTERS + len(event.value)
            self._put(event, _Built(value, size), event.anchor)

    def _key(self, parent: _Open, event: yaml.NodeEvent) -> None:
        if not isinstance(event, yaml.ScalarEvent):
            _refuse(event, "a key is a list, a mapping or an alias; write it as text")
        key = _text(event)
        if key in parent.value:
            _refuse(event, f"the key {_shown(key)} appears twice in one mapping")
        if event.anchor is not None:
            self._anchors[event.anchor] = _Built(key, _VALUE_CHARACTERS + len(key))
        parent.key = key
        parent.size += len(key)
        self._count(event, len(key))

    def _put(self, event: yaml.Event, built: _Built, anchor: str | None) -> None:
        """Put a finished value where it belongs."""
        if anchor is not None:
            self._anchors[anchor] = built
        if isinstance(event, yaml.CollectionEndEvent):
            self._count(event, _VALUE_CHARACTERS)  # its items were counted when they came
        else:
            self._count(event, built.size)
        if self._open:
            self._open[-1].put(built)
        else:
            self._root = built.value

    def _copy_of(self, event: yaml.AliasEvent) -> _Built:
        name = str(event.anchor)
        shown = "*" + _shown(name, "")
        if name in (one.anchor for one in self._open):
            _refuse(event, f"the alias {shown} is inside what it names")
        built = self._anchors.get(name)
        if built is None:
            _refuse(event, f"the alias {shown} names nothing before it")
        if len(self._open) + built.depth > MAX_DEPTH:
            _refuse(event, f"it is nested deeper than {MAX_DEPTH} levels")
        if self._size + built.size > MAX_CHARACTERS:
            self._count(event, built.size)
        return built._replace(value=_copied(built.value))

    def _count(self, event: yaml.Event, size: int) -> None:
        self._size += size
        if self._size > MAX_CHARACTERS:
            _refuse(event, "it holds more values than are read, counting what aliases stand for")


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value


def _scalar(event: yaml.ScalarEvent) -> Any:
    """A value without items: null, a boolean, a number or text."""
    text: str = event.value
    if not event.implicit[0]:  # in quotes, or a block
        return _text(event)
    tag = next((tag for tag, pattern, _ in _RESOLVERS if pattern.fullmatch(text)), None)
    if tag == _NULL:
        return None
    if tag == _BOOL:
        return text.lower() == "true"
    if tag == _INT:
        return _integer(event, text.replace("_", ""))
    if tag == _FLOAT:
        return _number(event, text.replace("_", "").lower())
    return text


def _integer(event: yaml.ScalarEvent, digits: str) -> int:
    if len(digits.lstrip("-+")) > _INTEGER_DIGITS or int(digits) not in _INTEGERS:
        _refuse(event, f"the number {_shown(event.value, '')} does not fit into 64 bits")
    return int(digits)


def _number(event: yaml.ScalarEvent, digits: str) -> float:
    if digits.endswith(("inf", "nan")):
        return float(digits.replace(".", ""))
    value = float(digits)
    if math.isinf(value):
        _refuse(event, f"the number {_shown(event.value, '')} is larger than 1.8e308")
    return value


def _text(event: yaml.ScalarEvent) -> str:
    """Text with the surrogate pairs of JSON's escapes as the characters that they are."""
    text: str = event.value
    try:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        _refuse(event, "an escape such as \\ud83d is half a character; write the character itself")
    if found := _NOT_TEXT.search(text):
        _refuse(event, _unprintable(found[0]))
    return text


def _unprintable(character: str) -> str:
    kind = "half a character" if "\ud800" <= character <= "\udfff" else "a control character"
    return f"{kind}, U+{ord(character):04X}, is not text; leave it out"


def _refuse(event: yaml.Event, problem: str) -> NoReturn:
    raise YamlError(_at(event.start_mark, problem))


def _at(mark: Any, problem: str) -> str:
    """A problem in one line, after its line and column."""
    line = " ".join(problem.split())
    if len(line) > _MESSAGE_CHARACTERS:
        line = line[:_MESSAGE_CHARACTERS] + "..."
    return f"line {mark.line + 1}, column {mark.column + 1}: {line}" if mark else line


def _place_in(before: str) -> str:
    """Line and column of what follows a text."""
    return f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"


def _shown(text: str, quote: str = "'") -> str:
    shown = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
    return f"{quote}{shown}{quote}"
