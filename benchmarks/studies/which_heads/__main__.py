"""Study: which n, and which kind of heads, on source code and on prose.

`python -m benchmarks.studies.which_heads [--quick]` trains models of equally many parameters on
equally many tokens of the standard library's sources, and of the documentation that lies on the
machine, and evaluates each on held-out text of its own corpus.
"""

import json
import sys
from pathlib import Path

from benchmarks.studies.runner import Figures, Study, Trained, command, main, shard
from benchmarks.studies.texts import copied, documentation, source_code

_MOST_BYTES, _QUICK_BYTES = 24_000_000, 400_000
_VOCABULARY = 512


def prepare(folder: Path, quick: bool) -> dict[str, Path]:
    """Two shard sets, each with a tokenizer of its own of the same size."""
    most = _QUICK_BYTES if quick else _MOST_BYTES
    found = {}
    for name, paths in (("code", source_code()), ("prose", documentation())):
        raw = copied(folder / name, paths, most)
        found[name] = shard(
            folder / f"{name}-shards",
            *("--input", str(raw), "--tokenizer", f"train:{_VOCABULARY}", "--dedup"),
            *("--validation-fraction", "0.05", "--glob", "*.txt"),
        )
    return found


def measure(trained: Trained, quick: bool) -> Figures:
    """Held-out losses and bits per byte, tokens per forward expected and realised."""
    path = trained.export.parent / "evaluation.json"
    command(
        *("-m", "pipeline.evaluate", str(trained.export), "--data", str(trained.shards)),
        *("--max-tokens", "2000" if quick else "100000", "--prompts", "2" if quick else "16"),
        *("--json", str(path)),
    )
    found = json.loads(path.read_text())
    held_out = found["held_out"]["all"]
    figures = {
        "bits_per_byte": held_out["bits_per_byte"][0],
        "expected": held_out["tokens_per_forward"][-1],
    }
    for decoding in found["decoding"].values():  # of the corpus; none with one head
        figures["realised"] = decoding["tokens_per_forward"]
    for head, loss in enumerate(held_out["losses"], 1):
        figures[f"loss_{head}"] = loss
    return figures


STUDY = Study(
    folder=Path(__file__).parent,
    title="Which n, and which kind of heads",
    prepare=prepare,
    measure=measure,
    columns={
        "loss_1": "loss, next token",
        "bits_per_byte": "bits per byte",
        **{f"loss_{k}": f"loss, head {k}" for k in (2, 3, 4, 8)},
        "expected": "tokens per forward, expected",
        "realised": "realised",
    },
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
