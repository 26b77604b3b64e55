"""YAML of any origin: a plain value, or one line that says where it is at fault."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.yaml_text import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    YamlError,
    dump_yaml,
    parse_yaml,
    read_yaml,
)


def refusal(text: str) -> str:
    """The one line that refuses a text."""
    with pytest.raises(YamlError) as caught:
        parse_yaml(text)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 250
    message.encode()  # it can be printed
    return message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("-1_000", -1000),
        ("1__0", 10),
        ("012", "012"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("off", "off"),
        ("yes", "yes"),
        ("True", True),
        ("~", None),
        ("", None),
        ("# nothing", None),
        ("'5'", "5"),
        ("|\n  5\n", "5\n"),
        (".inf", float("inf")),
        ("-.INF", -float("inf")),
        ("1e-400", 0.0),
        ("18446744073709551615", (1 << 64) - 1),
        ("{1: a, true: b, ~: c}", {"1": "a", "true": "b", "~": "c"}),
        ("\ufeffa: 1", {"a": 1}),
        ('"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
    ],
)
def test_plain_values(text: str, value: object) -> None:
    """Numbers are decimal, two words are booleans, keys are text, the rest is text as written."""
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


def test_aliases_are_copies() -> None:
    """What stands for the same text is equal, and changing one leaves the others."""
    value = parse_yaml("a: &x {k: [1, 2]}\nb: *x\nc: [*x, *x]\n")
    assert value == {"a": {"k": [1, 2]}, "b": {"k": [1, 2]}, "c": [{"k": [1, 2]}] * 2}
    value["b"]["k"].append(3)
    assert value["a"] == value["c"][0] == value["c"][1] == {"k": [1, 2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "line 2, column 1: the key 'a' appears twice"),
        ("1: a\n'1': b", "line 2, column 1: the key '1' appears twice"),
        ("a: [1", "line 1, column 6: "),
        ("a:\n\t- b", r"line 2, column 1: found character '\t'"),
        ("a: !!int abc", "line 1, column 4: the tag !!int is not read"),
        ("a: !!python/object/apply:os.system [ls]", "the tag !!python/object"),
        ("a: ! 12", "the tag ! is not read"),
        ("? [a]\n: b", "line 1, column 3: a key is a list"),
        ("a: &x b\n*x : c", "line 2, column 1: a key is a list, a mapping or an alias"),
        ("a: *b", "line 1, column 4: the alias *b names nothing before it"),
        ("a: &a [1, *a]", "the alias *a is inside what it names"),
        ("a: 1\n---\nb: 2", "line 2, column 1: a second document begins"),
        ("%YAML 2.0\n---\na", "incompatible YAML document"),
        ('a: "\\0"', "line 1, column 4: a control character, U+0000"),
        ('a: "\\e[31m"', "a control character, U+001B"),
        ("a: \0", "line 1, column 4: a control character, U+0000"),
        ("\n b: \x85\x9b", "line 2, column 6: a control character, U+009B"),
        ('a: "\\ud800"', r"an escape such as \ud83d is half a character"),
        ('"\\ud800": a', "half a character"),
        ("a: \udcff", "line 1, column 4: half a character, U+DCFF"),
        ('a: "\\U00110000"', "line 1, column 7: "),
        ('a: "\\UFFFFFFFF"', "line 1, column 7: "),
        (f"%YAML {'9' * 5000}.1\n--- a", "line 1"),
        ("a: 18446744073709551616", "18446744073709551616 does not fit into 64 bits"),
        ("a: -9223372036854775809", "does not fit into 64 bits"),
        (f"a: {'9' * 400}", "9... does not fit into 64 bits"),
        (f"a: {'9' * 5000}", "9... does not fit into 64 bits"),
        (f"a: {'9' * 400}.0", "9... is larger than 1.8e308"),
        ("a: 1e999", "1e999 is larger than 1.8e308"),
        (f"{{{'k' * 900}: 1, {'k' * 900}: 2}}", "kkk...' appears twice"),
        (f"a: *{'b' * 9000}", "bbb... names nothing before it"),
        ("x" * (MAX_CHARACTERS + 1), "longer than 1,048,576 characters"),
    ],
)
def test_refused_in_one_line(text: str, message: str) -> None:
    """The line and column, what is wrong, and long texts shortened."""
    assert message in refusal(text)


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "[{a: ", "a0: &a0 [x]"])
def test_nesting_is_bounded(opening: str) -> None:
    """Depth is an error at the level that is too deep, in lists, mappings and by aliases."""
    text = opening * 100_000
    if "&" in opening:
        text = opening + "".join(f"\na{i + 1}: &a{i + 1} [*a{i}]" for i in range(500))
    assert f"it is nested deeper than {MAX_DEPTH} levels" in refusal(text)
    assert parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH)


@pytest.mark.parametrize(
    "bomb",
    [
        # Nine lists of nine of the list before: 9**10 values.
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9)),
        "a0: &a0 {x: y}\n"
        + "".join(f"a{i + 1}: &a{i + 1} {{b: *a{i}, c: *a{i}}}\n" for i in range(50)),
        f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 1000)}]\n",
        f"? &a {'x' * 100_000}\n: [{', '.join(['*a'] * 1000)}]\n",
    ],
)
def test_what_aliases_expand_to_is_bounded(bomb: str) -> None:
    """Refused before it is written out, which would take more than any machine has."""
    assert "counting what aliases stand for" in refusal(bomb)


def test_long_scalars_are_values() -> None:
    """Length alone is no fault."""
    long = "x y" * 100_000
    assert parse_yaml(f"a: {long}\nb: '{long}'") == {"a": long, "b": long}


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("ab1.-+e_~:,[]{}&*!|>'\"%@#? \n\t\\u08xd\0\udc80é"), max_size=60)
)
def test_any_text_is_a_value_or_one_line(text: str) -> None:
    """No other exception, whatever the text; what is read can be written and read again."""
    try:
        value = parse_yaml(text)
    except YamlError as error:
        assert re.fullmatch(r"line \d+, column \d+: .+", str(error))  # noqa: PT017 - either is right
        return
    assert repr(parse_yaml(dump_yaml(value))) == repr(value)  # by text: nan is not equal to itself


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=20)
    | st.sampled_from(["1e-5", "null", "~", "012", "true", "", "a: b", "- x", "!!int 1", ".inf"])
)


@settings(max_examples=200, deadline=None)
@given(
    value=st.recursive(
        _SCALARS,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text("ab1~:e- ", max_size=5), inner)
        ),
        max_leaves=20,
    )
)
def test_what_is_written_reads_back(value: Any) -> None:
    """Whatever looks like another type is quoted."""
    text = dump_yaml(value)
    found = parse_yaml(text)
    assert found == value
    assert dump_yaml(found) == text


def test_files(tmp_path: Path) -> None:
    """A byte order mark is skipped; bytes that are no text and files without an end are refused."""
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: \xc3\xa9\n")
    assert read_yaml(path) == {"a": "é"}
    path.write_bytes(b"a: \xc3\xa9\nb: \xff\n")
    with pytest.raises(YamlError, match="line 2, column 4: byte 0xff is not UTF-8"):
        read_yaml(path)
    path.write_bytes("a: 1\n".encode("utf-16"))
    with pytest.raises(YamlError, match="line 1, column 1: byte 0xff is not UTF-8"):
        read_yaml(path)
    with pytest.raises(YamlError, match="longer than"):
        read_yaml(Path("/dev/zero"))
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "none.yaml")
