"""A page about a run with data.review: what became of its sequences from epoch to epoch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError
from foundation.pages import Figures, Listing, Paragraph, Section, Table, render_page
from foundation.plots import svg_plot
from model.errors import ConfigError
from pipeline.review.examples import Example, examples_of
from pipeline.review.profile import (
    PUBLISHED_FORGOTTEN,
    PUBLISHED_SEVERAL,
    Profile,
    epochs_of,
    hardest_and_most_forgotten,
    profile_of,
)

_BINS = 60
_CHUNK = 1 << 22
_SHOWN = 5  # examples of each kind
_MOST_LETTERS = 800
_LEAD = (
    "Losses of head 1 over each sequence, when it was trained on. Learned: the last loss is below "
    "the first. Forgotten: it rose after it had fallen. The paper's figures are of eight epochs "
    "of GPT-2 on OpenWebText."
)


def review_page(run_dir: Path) -> str:
    """The page as HTML.

    Raises:
        ConfigError: the run has not recorded two epochs.
    """
    epochs = epochs_of(run_dir)
    profile = profile_of(epochs)
    sections = [
        Section("Sequences", [Table(_rows(profile), ["", "count", "share", "published"])]),
        Section("Over epochs", [Figures([_histogram(epochs), _descents(profile)])]),
        *_examples(run_dir, epochs),
    ]
    return render_page("learn, focus, review", run_dir.resolve().name, _LEAD, sections)


def _examples(run_dir: Path, epochs: Sequence[NDArray[np.float32]]) -> list[Section]:
    """What the hardest sequences say, and those that were forgotten most often."""
    titles = ("Highest last loss", "Forgotten most often")
    groups = hardest_and_most_forgotten(epochs, _SHOWN)
    try:
        found = [
            [_listing(one) for one in examples_of(run_dir, epochs, numbers)]
            if numbers
            else [Paragraph("None.")]
            for numbers in groups
        ]
    except (ConfigError, DataError) as error:
        return [Section("Examples", [Paragraph(f"The texts cannot be shown: {error}.")])]
    return [Section(title, blocks) for title, blocks in zip(titles, found, strict=True)]


def _listing(one: Example) -> Listing:
    """A sequence with its losses above it."""
    losses = " ".join("-" if loss is None else f"{loss:.2f}" for loss in one.losses)
    text = one.text if len(one.text) <= _MOST_LETTERS else one.text[:_MOST_LETTERS] + " [...]"
    return Listing(f"sequence {one.number:,} of {one.source}; by epoch: {losses}\n\n{text}")


def _rows(profile: Profile) -> list[list[str]]:
    all_of = profile.sequences

    def row(name: str, count: int, of: int, published: str = "") -> list[str]:
        return [name, f"{count:,}", f"{count / max(of, 1):.1%}", published]

    return [
        row("seen twice or more", all_of, all_of),
        row("learned", profile.learned, all_of),
        row("unlearned", profile.unlearned, all_of),
        row("forgotten", profile.forgotten, all_of, f"{PUBLISHED_FORGOTTEN:.0%}"),
        row(
            "forgotten several times, of those",
            profile.forgotten_again,
            profile.forgotten,
            f"{PUBLISHED_SEVERAL:.0%}",
        ),
    ]


def _histogram(epochs: Sequence[NDArray[np.float32]]) -> Any:
    """How the losses of each epoch are spread."""

    def draw(axes: Any) -> None:
        edges = np.linspace(0, max(_highest(losses) for losses in epochs), _BINS + 1)
        for number, losses in enumerate(epochs, start=1):
            counts = np.zeros(_BINS, np.int64)
            for part in _finite_parts(losses):
                counts += np.histogram(part, edges)[0]
            axes.stairs(counts, edges, label=f"epoch {number}")
        axes.set_xlabel("nats per token")
        axes.set_ylabel("sequences")
        axes.legend()

    return svg_plot("Losses of sequences", draw)


def _highest(losses: NDArray[np.float32]) -> float:
    return max((float(part.max(initial=0)) for part in _finite_parts(losses)), default=0) or 1.0


def _finite_parts(losses: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Losses of an epoch that are numbers, a part at a time: arrays may be larger than memory."""
    for start in range(0, len(losses), _CHUNK):
        part = losses[start : start + _CHUNK]
        yield part[(part >= 0) & np.isfinite(part)]


def _descents(profile: Profile) -> Any:
    """How often losses began to fall."""

    def draw(axes: Any) -> None:
        axes.bar(range(len(profile.descents)), profile.descents)
        axes.set_xlabel("descents")
        axes.set_ylabel("sequences")

    return svg_plot("Descents", draw)
