"""Trains and measures the points of a study; what is there already is not done again.

A point's result is one JSON file, written last. Killed at any time, the same command goes on: a run
resumes from its last checkpoint, and a point with a result is left alone as long as its
configuration and the study's data are the same.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.studies.grid import Grid, configured, load_grid, point_name
from benchmarks.studies.results import write_results
from foundation.durable_files import write_whole

Figures = dict[str, float]


class Trained(NamedTuple):
    """A point that was trained.

    Attributes:
        export: the folder of its export.
        shards: what it was trained on.
        records: of its metrics.jsonl.
        settings: of the point.
    """

    export: Path
    shards: Path
    records: list[dict[str, Any]]
    settings: dict[str, Any]

    @property
    def held_out_loss(self) -> float:
        """Of head 1, nats per token, when it was last validated."""
        key = "eval_loss_head_1"
        return float(next(record[key] for record in reversed(self.records) if key in record))


class Study(NamedTuple):
    """What a study brings.

    Attributes:
        folder: where its grid.yaml and README.md lie.
        title: of the page.
        prepare: makes shard sets in a folder, by their names; told whether it is a quick try. A
            point has the one that its `data.shards` names, or the only one.
        measure: figures of a trained point, by name; told whether it is a quick try.
        columns: figures of the table, with their headings.
    """

    folder: Path
    title: str
    prepare: Callable[[Path, bool], dict[str, Path]]
    measure: Callable[[Trained, bool], Figures]
    columns: Mapping[str, str]


def main(study: Study, arguments: Sequence[str] | None = None) -> int:
    """Run a study's command; give its exit status."""
    parser = argparse.ArgumentParser(description=study.title)
    parser.add_argument("--quick", action="store_true", help="a try of a minute; writes no results")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="runs and data (default runs/studies/NAME)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="README.md and result.html (default: its folder)"
    )
    options = parser.parse_args(arguments)
    name = study.folder.name + ("-quick" if options.quick else "")
    work: Path = options.work or Path("runs/studies") / name
    output: Path | None = options.output or (None if options.quick else study.folder)
    grid = load_grid(study.folder / "grid.yaml", quick=options.quick)
    results = run_points(study, grid, work, quick=options.quick)
    print(write_results(study.title, study.columns, grid, results, output))
    return 0


def run_points(study: Study, grid: Grid, work: Path, *, quick: bool) -> list[dict[str, Any]]:
    """Results of all points, in the order of the grid."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "data").mkdir(exist_ok=True)
    prepared = study.prepare(work / "data", quick)
    points, results = list(grid.settings()), []
    for number, settings in enumerate(points, 1):
        folder = work / point_name(settings)
        config = configured(grid.run, settings)
        config["run"] |= {"name": folder.name, "dir": str(folder / "run")}
        shards = prepared[settings.get("data.shards", next(iter(prepared)))]
        config["data"]["shards"] = str(shards)
        fingerprint = json.loads((shards / "manifest.json").read_text())["fingerprint"]
        wanted = _digest([config, fingerprint])
        result = _stored(folder, wanted)
        if result is None:
            print(f"point {number} of {len(points)}: {folder.name}", file=sys.stderr, flush=True)
            started = time.monotonic()
            trained = _train(folder, config, shards, settings, wanted)
            figures = study.measure(trained, quick)
            result = {
                "digest": wanted,
                "settings": settings,
                "figures": figures,
                "seconds": round(time.monotonic() - started),
            }
            write_whole(folder / "result.json", json.dumps(result, indent=1).encode())
        results.append(result)
    return results


def shard(output: Path, *arguments: str) -> Path:
    """Make a shard set, unless it is there."""
    if not (output / "manifest.json").exists():
        command("data_prep/shard.py", "--output", str(output), *arguments)
    return output


def command(*arguments: str) -> None:
    """Run one of the project's commands; its output is shown only when it fails.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-4000:], file=sys.stderr)
        raise SystemExit(f"{' '.join(arguments[:4])} ended with status {done.returncode}")


def _train(
    folder: Path, config: dict[str, Any], shards: Path, settings: dict[str, Any], digest: str
) -> Trained:
    """Train to the end, going on where a run of the same configuration stopped; and export."""
    begun = folder / "digest"
    if folder.exists() and (not begun.exists() or begun.read_text() != digest):
        shutil.rmtree(folder)  # of another configuration
    folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(digest)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    command("-m", "pipeline.train", str(path))
    export = folder / "export"
    shutil.rmtree(export, ignore_errors=True)
    command("-m", "pipeline.export", str(folder / "run"), str(export))
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return Trained(export, shards, [json.loads(line) for line in lines], settings)


def _stored(folder: Path, digest: str) -> dict[str, Any] | None:
    """The result of an earlier command, if it is of the same configuration and data."""
    try:
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("digest") == digest else None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
