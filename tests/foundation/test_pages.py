"""Pages of reports: whatever the text, it is shown as text, and nothing comes from elsewhere."""

from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError

from foundation.pages import (
    Block,
    Figures,
    Listing,
    Paragraph,
    Section,
    Table,
    _environment,
    render_page,
)
from foundation.plots import shades, svg_plot

HOSTILE = "<script>alert('a & \"b\"')</script>"


class Outline(HTMLParser):
    """Tags of a page that are still open, and the text in each kind of element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Open an element."""
        self.tags.append(tag)
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost one, which has to be of that kind."""
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """An element without content."""
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        """Text of the innermost element."""
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)


def _page() -> str:
    plot = svg_plot(
        HOSTILE, lambda axes: axes.plot([1, 2], [3, 4], label=HOSTILE) and axes.legend()
    )
    blocks: list[Block] = [
        Table([(HOSTILE, 5)]),
        Table([("a", HOSTILE)], ("head", HOSTILE)),
        Figures([plot]),
        Listing(HOSTILE + "\n  indented\n"),
        Paragraph(HOSTILE),
    ]
    return render_page("report", HOSTILE, HOSTILE, [Section(HOSTILE, blocks)])


def test_text_is_shown_as_text() -> None:
    """Names from data and runs cannot become markup, in any block or in a plot."""
    outline = Outline(_page())
    assert outline.open == []
    assert "script" not in outline.tags
    for tag in ("h1", "h2", "th", "td", "p"):
        assert HOSTILE in outline.texts[tag], tag
    assert outline.texts["title"][0] == f"{HOSTILE}: report"
    assert outline.texts["pre"] == [HOSTILE + "\n  indented\n"]
    assert HOSTILE in outline.texts["text"]  # the legend of the plot


def test_blocks_come_in_their_order() -> None:
    """Tables, plots and text below their headings."""
    sections = [
        Section("first", [Paragraph("one"), Table([("a", 1), ("b", 2)], ("name", "value"))]),
        Section("second", [Listing("two"), Figures([])]),
    ]
    page = render_page("report", "name", "lead", sections)
    parts = ["name</h1>", "lead", "first", "one", "<th", "a</td>", "2</td>", "second", "two"]
    at = [page.index(part, page.index("<body>")) for part in parts]
    assert at == sorted(at)


def test_a_value_that_is_missing_is_an_error() -> None:
    """A template never shows nothing for a name that it does not get."""
    with pytest.raises(UndefinedError):
        _environment().from_string("{{ nothing }}").render()


def test_plots_of_one_page_keep_apart() -> None:
    """Ids differ from plot to plot, and are the same from run to run."""

    def ids(title: str) -> list[str]:
        svg = svg_plot(title, lambda axes: axes.plot([1, 2], [3, 4]))
        return [part.partition('"')[0] for part in svg.split('<clipPath id="')[1:]]

    assert ids("a") == ids("a") != []
    assert not set(ids("a")) & set(ids("b"))


def test_shades_differ() -> None:
    """Each of several curves has a color of its own, for any number of them."""
    assert shades(0) == []
    assert len(shades(1)) == 1
    assert len(set(shades(9))) == 9
