"""Pages of reports: one HTML file that needs no other file and no network.

A report gives its sections as data; how they look is the business of templates/page.html.j2. All
text is escaped there; only `plots.svg_plot` and `link` give markup that is not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of each being its name; without heads, pairs of name and value."""

    rows: Sequence[Sequence[object]]
    heads: Sequence[str] = ()
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figures:
    """Plots, as many in a row as there is room for."""

    svgs: Sequence[Markup]
    kind: ClassVar[str] = "figures"


@dataclass(frozen=True)
class Listing:
    """Text in a fixed width, line by line as it is."""

    text: str
    kind: ClassVar[str] = "listing"


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str
    kind: ClassVar[str] = "paragraph"


Block = Table | Figures | Listing | Paragraph


class Section(NamedTuple):
    """A heading with what is below it."""

    title: str
    blocks: Sequence[Block]


def link(path: str, text: str) -> Markup:
    """A cell that leads to a file beside the page or below it."""
    return Markup('<a href="./{}">{}</a>').format(quote(path), text)


def render_page(kind: str, name: str, lead: str, sections: Iterable[Section]) -> str:
    """The page as HTML.

    Args:
        kind: what it reports on, for the title of the window.
        name: the heading.
        lead: one sentence below it.
        sections: the rest, in order.
    """
    template = _environment().get_template("page.html.j2")
    return template.render(kind=kind, name=name, lead=lead, sections=list(sections))


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("foundation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
