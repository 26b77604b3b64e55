"""Directives whose content is Markdown that was made from code."""

from collections.abc import Sequence

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective


class MarkdownDirective(SphinxDirective):
    """A directive of one argument that stands for the lines that `lines` gives for it."""

    required_arguments = 1
    final_argument_whitespace = False

    def lines(self, argument: str) -> list[str]:
        """The Markdown that the directive stands for."""
        raise AssertionError(f"{type(self).__name__} does not say what it stands for")

    def run(self) -> list[nodes.Node]:
        """Parse the lines where the directive is."""
        container = nodes.Element()
        content = StringList(self.lines(self.arguments[0]), source=self.get_source_info()[0])
        self.state.nested_parse(content, self.content_offset, container)
        return container.children


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; `|` within a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    ]
