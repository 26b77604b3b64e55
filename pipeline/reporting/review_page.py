"""A page about a run with data.review: what became of its sequences from epoch to epoch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foundation.pages import Figures, Section, Table, render_page
from foundation.plots import svg_plot
from pipeline.review.profile import (
    PUBLISHED_FORGOTTEN,
    PUBLISHED_SEVERAL,
    Profile,
    epochs_of,
    profile_of,
)

_BINS = 60
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
    ]
    return render_page("learn, focus, review", run_dir.resolve().name, _LEAD, sections)


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
        for number, losses in enumerate(epochs, start=1):
            seen = losses[(losses >= 0) & np.isfinite(losses)]
            axes.hist(seen, bins=_BINS, histtype="step", label=f"epoch {number}")
        axes.set_xlabel("nats per token")
        axes.set_ylabel("sequences")
        axes.legend()

    return svg_plot("Losses of sequences", draw)


def _descents(profile: Profile) -> Any:
    """How often losses began to fall."""

    def draw(axes: Any) -> None:
        axes.bar(range(len(profile.descents)), profile.descents)
        axes.set_xlabel("descents")
        axes.set_ylabel("sequences")

    return svg_plot("Descents", draw)
