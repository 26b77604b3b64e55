"""JSON of any origin: bounded in size and depth, with numbers of 64 bits and whole characters.

Python's own reader takes what nobody can use further: nesting that overflows the stack of whoever
walks it, integers of thousands of digits, NaN, and halves of characters that cannot be printed.
"""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from foundation.bounded_files import MAX_BYTES, read_bounded

MAX_DEPTH = 64
_INTEGERS = range(-(1 << 63), 1 << 63)
_INTEGER_DIGITS = 20
_TOO_DEEP = f"it is nested deeper than {MAX_DEPTH} levels"


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than `max_bytes`.
        ValueError: it is not JSON as this module reads it.
    """
    return parse_json(read_bounded(path, max_bytes))


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: it is not JSON as this module reads it; one line says why.
    """
    try:
        text = content.decode("utf-8")
        value = json.loads(
            text, parse_int=_integer, parse_float=_number, parse_constant=_refuse_constant
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # fails on half a character
    except UnicodeEncodeError:
        raise ValueError("an escape is half a character") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(value)
    return value


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for one in level
            if isinstance(one, list | dict)
            for item in (one.values() if isinstance(one, dict) else one)
            if isinstance(item, list | dict)
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _integer(digits: str) -> int:
    if len(digits) > _INTEGER_DIGITS or int(digits) not in _INTEGERS:
        raise ValueError("a number does not fit into 64 bits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError("a number is larger than 1.8e308")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
