"""Study: is training on what is hard worth more than training on everything as often?

`python -m benchmarks.studies.lfr [--quick]` trains the same model on Python's standard library and
on documentation, with the published schedule of `data.review` and in random order, for equally many
tokens and steps, with the same seeds and learning rates, and evaluates each on held-out text.
"""

import json
import sys
from pathlib import Path

import yaml

from benchmarks.studies.runner import Figures, Study, Trained, command, main, shard
from benchmarks.studies.texts import copied, documentation, source_code
from pipeline.review.files import review_folder
from pipeline.review.profile import epochs_of, profile_of

_MOST_BYTES, _QUICK_BYTES = 6_000_000, 400_000
_VOCABULARY = 512


def prepare(folder: Path, quick: bool) -> dict[str, Path]:
    """One shard set of two sources, code and prose, of equally many bytes."""
    most = _QUICK_BYTES if quick else _MOST_BYTES
    texts = {"code": source_code(), "prose": documentation()}
    sources = [
        {"name": name, "input": str(copied(folder / name, paths, most)), "glob": ["*.txt"]}
        for name, paths in texts.items()
    ]
    config = folder / "shards.yaml"
    config.write_text(yaml.safe_dump({"dedup": "exact", "sources": sources}))
    return {
        "texts": shard(
            folder / "texts",
            *("--config", str(config), "--tokenizer", f"train:{_VOCABULARY}"),
            *("--validation-fraction", "0.05"),
        )
    }


def measure(trained: Trained, quick: bool) -> Figures:
    """Held-out loss of each source, and which sequences were forgotten on the way."""
    path = trained.export.parent / "evaluation.json"
    command(
        *("-m", "pipeline.evaluate", str(trained.export), "--data", str(trained.shards)),
        *("--max-tokens", "2000" if quick else "100000", "--prompts", "0"),
        *("--json", str(path)),
    )
    held_out = json.loads(path.read_text())["held_out"]
    figures = {"loss": held_out["all"]["losses"][0], "steps": trained.records[-1]["step"]}
    for source, found in held_out["kinds"].items():
        figures[source] = found["losses"][0]
    run_dir = trained.export.parent / "run"
    if len(list(review_folder(run_dir).glob("losses_epoch_*"))) > 1:
        profile = profile_of(epochs_of(run_dir))
        figures["forgotten"] = profile.forgotten_share
        figures["again"] = profile.forgotten_again_share
    return figures


STUDY = Study(
    folder=Path(__file__).parent,
    title="Learn, focus, review against random order",
    prepare=prepare,
    measure=measure,
    columns={
        "loss": "held-out loss, next token",
        "code": "of code",
        "prose": "of prose",
        "forgotten": "forgotten once or more",
        "again": "several times, of those",
    },
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
