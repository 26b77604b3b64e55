"""`{command} MODULE`: the arguments of a command, from its own parser."""

import argparse
import importlib
import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from typing import Any, NoReturn
from unittest.mock import patch

from sphinx.application import Sphinx

from docs.extensions.markdown import MarkdownDirective, table
from pipeline.commands import COMMANDS

# The module of each command, as `headway` knows them; two of its names stand for two modules each.
MODULES = tuple(module for command in COMMANDS.values() for module in command.modules)


class _ParserFoundError(Exception):
    """Carries the parser out of a command that was about to use it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


@cache
def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser that a command builds before it does anything else.

    Raises:
        AssertionError: The module's `main` parses no arguments.
    """

    def found(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        raise _ParserFoundError(self)

    main = importlib.import_module(module).main
    with patch.object(argparse.ArgumentParser, "parse_args", found):
        try:
            main([])
        except _ParserFoundError as carrier:
            return carrier.parser
    raise AssertionError(f"{module}.main builds no argument parser")


def refusal(module: str, arguments: Sequence[str]) -> str | None:
    """Why a command would refuse these arguments; None when its parser takes them."""
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            parser_of(module).parse_args(list(arguments))
    except SystemExit as stop:
        return said.getvalue() if stop.code else None
    return None


def _rows(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        names = [f"`{name}`" for name in action.option_strings] or [f"`{action.dest}`"]
        yield [", ".join(names), _value(action), _escaped(_help(parser, action))]


def _value(action: argparse.Action) -> str:
    """What follows the option: a name for the value, or the choices; empty for a switch."""
    if action.choices is not None:
        return " or ".join(f"`{choice}`" for choice in action.choices)
    if action.nargs == 0 or not action.option_strings:
        return ""
    name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return f"`{name}`" + (" ..." if action.nargs in ("+", "*") else "")


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    needed = action.required and action.option_strings
    return f"{text} (required)" if needed else text


def _escaped(text: str) -> str:
    """Help is plain text; nothing in it is Markdown."""
    return "".join(f"\\{sign}" if sign in "*_`<>[]#$" else sign for sign in text)


class CommandDirective(MarkdownDirective):
    """The table of a command's arguments."""

    def lines(self, argument: str) -> list[str]:
        """Description and arguments of the command."""
        parser = parser_of(argument)
        description = " ".join((parser.description or "").split())
        rows = list(_rows(parser))
        return [_escaped(description), "", *table(["argument", "value", "meaning"], rows), ""]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("command", CommandDirective)
    return {"parallel_read_safe": True}
