"""Counts of a server, in the text form of Prometheus."""

import threading
from collections.abc import Callable

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "headway_"
_HELP = {
    "requests_total": "Answers, by path and status of HTTP.",
    "prompt_tokens_total": "Tokens of prompts that were read.",
    "generated_tokens_total": "New tokens.",
    "finished_total": "Texts that have ended.",
    "cancelled_total": "Texts whose client was gone before they ended.",
    "refused_total": "Requests that found the queue full.",
    "failures_total": "Batches that failed.",
    "forwards_total": "Forwards, without those that read prompts.",
    "forward_rows_total": "Rows of these forwards; tokens over rows are tokens per forward.",
    "request_seconds": "Seconds from a request to the end of its answer.",
    "first_token_seconds": "Seconds from a request to its first token.",
    "decoder_texts_total": "Texts of decoders that requests asked for, by decoder; begun ones.",
    "decoder_forwards_total": "Their forwards, which are among the others above, by decoder.",
    "draft_forwards_total": "Forwards of a draft model, those that read prompts among them.",
    "running": "Texts that run.",
    "running_beams": "Beams that texts with a decoder of their own have at most.",
    "waiting": "Texts that wait for room.",
}
_LABELLED = ("requests_total", "decoder_texts_total", "decoder_forwards_total")
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters, histograms of seconds, and values that are looked up when asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], float] = {
            (name, ""): 0 for name in _HELP if name.endswith("_total") and name not in _LABELLED
        }
        self._seconds: dict[str, list[int]] = {
            name: [0] * (len(_BUCKETS) + 1) for name in _HELP if name.endswith("_seconds")
        }
        self._sums = dict.fromkeys(self._seconds, 0.0)
        self._watched: dict[str, Callable[[], float]] = {}

    def count(self, name: str, amount: float = 1, labels: str = "") -> None:
        """Add to a counter; labels as Prometheus writes them, without braces."""
        with self._lock:
            self._counts[name, labels] = self._counts.get((name, labels), 0) + amount

    def took(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        place = sum(seconds > bound for bound in _BUCKETS)
        with self._lock:
            self._seconds[name][place] += 1
            self._sums[name] += seconds

    def watch(self, name: str, value: Callable[[], float]) -> None:
        """Show a value that is asked for each time; it is a counter if its name says so."""
        self._watched[name] = value

    def text(self) -> str:
        """All of it."""
        with self._lock:
            samples = [
                (name, "counter", f"{{{labels}}}" if labels else "", value)
                for (name, labels), value in sorted(self._counts.items())
                if name not in self._watched
            ]
            for name, counts in self._seconds.items():
                total = 0
                for bound, count in zip((*map(str, _BUCKETS), "+Inf"), counts, strict=True):
                    total += count
                    samples.append((name, "histogram", f'_bucket{{le="{bound}"}}', total))
                samples.append((name, "histogram", "_sum", self._sums[name]))
                samples.append((name, "histogram", "_count", total))
        for name, look in self._watched.items():
            samples.append((name, "counter" if name.endswith("_total") else "gauge", "", look()))
        lines: list[str] = []
        for name, kind, rest, value in samples:
            head = f"# TYPE {_PREFIX}{name} {kind}"
            if head not in lines:
                lines += [f"# HELP {_PREFIX}{name} {_HELP[name]}", head]
            lines.append(f"{_PREFIX}{name}{rest} {value:g}")
        return "\n".join(lines) + "\n"
