"""The page about a shard set."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_prep.loading.length_figures import histogram, percentiles, sequence_figures
from data_prep.report import main
from data_prep.shards.manifest import load_manifest


class Cells(HTMLParser):
    """Rows of the tables of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._open = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Begin a row or a cell."""
        if tag == "tr":
            self.rows.append([])
        self._open = tag in ("td", "th")

    def handle_data(self, data: str) -> None:
        """Fill a cell."""
        if self._open:
            self.rows[-1].append(data)
            self._open = False


def test_the_page_says_what_the_manifest_says(
    tmp_path: Path,
    texts: list[str],
    build_mixture: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Totals, sources with weights, rejects by reason; and it needs nothing from outside."""
    directory = build_mixture(weights={"web": 3, "a&b": 1}, web=texts[:60], **{"a&b": texts[60:90]})
    output = tmp_path / "pages" / "page.html"
    assert main([str(directory), "--output", str(output)]) == 0
    page = output.read_text()
    assert not re.search(r"(src|href)=\"(https?:)?//", page)
    rows = {row[0]: row[1:] for row in Cells(page).rows if len(row) > 1}
    manifest = load_manifest(directory)
    tokens = sum(shard.tokens for shard in manifest.shards)
    assert rows["Documents"] == ["90"]
    assert rows["Tokens, ends of documents included"] == [f"{tokens:,}"]
    assert float(rows["Bytes of text per token"][0]) == pytest.approx(
        manifest.totals.text_bytes / tokens, abs=1e-3
    )
    assert rows["web"][0] == "60"
    assert rows["web"][3] == "3"
    assert rows["a&b"][0] == "30"
    assert rows["2,048"][0] == "100.00%"
    assert "<svg" in page
    assert "None." in page
    first = page
    assert main([str(directory), "--output", str(output)]) == 0
    assert output.read_text() == first


def test_rejects_are_listed_by_reason_and_file(
    tmp_path: Path, write_jsonl: Callable[..., Path], build_set: Callable[..., object]
) -> None:
    """Each reason with its count, and the files that they are in."""
    path = write_jsonl(["a good one", "another"])
    path.write_bytes(path.read_bytes() + b'{"text": 42}\n{"text": null}\nnot json\n')
    build_set(path, max_bad_fraction=1.0)
    assert main([str(tmp_path / "out"), "--output", str(tmp_path / "page.html")]) == 0
    rows = Cells((tmp_path / "page.html").read_text()).rows
    manifest = load_manifest(tmp_path / "out")
    for reason, count in manifest.totals.rejects_by_reason.items():
        assert [reason, str(count)] in rows
    assert [str(path), "3", "5"] in rows


def test_a_missing_set_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And leaves no page."""
    assert main([str(tmp_path / "none"), "--output", str(tmp_path / "page.html")]) == 1
    assert "not a directory" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_length_figures() -> None:
    """Worked by hand: lengths 1, 2, 3, 4, 9 in sequences of 4."""
    lengths = np.array([1, 2, 3, 4, 9])
    documents, tokens = histogram(lengths)
    assert documents.tolist() == [1, 2, 1, 1]
    assert tokens.tolist() == [1, 5, 4, 9]
    assert percentiles(lengths)[-1] == ("longest", 9)
    # The stream is A BB C|CC DD|DD.. : the third and fourth document are cut of the four that fit.
    (figures,) = sequence_figures(lengths, [4])
    assert (figures.sequence_length, figures.fitting, figures.cut) == (4, 0.8, 0.5)
    # Best fit: 4 | 4 | 4 | 3 1 | 2 and the rest of 1: 19 tokens in 5 sequences.
    assert figures.padding == pytest.approx(1 / 20)
