"""Trains and measures the points of a study; what is there already is not done again.

A point's result is one JSON file, written last. Killed at any time, the same command goes on: a run
resumes from its last checkpoint, and a point with a result is left alone as long as its
configuration and the study's data are the same. A run that several points begin with is trained
once.
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

from benchmarks.studies.grid import (
    INIT_FROM,
    SEED,
    Grid,
    configured,
    load_grid,
    point_name,
    variants,
)
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


class Run(NamedTuple):
    """What is trained for a point, or for points that begin with its export.

    Attributes:
        settings: of the point.
        folder: of all that comes of it.
        config: of the run.
        shards: what it is trained on.
        before: the run with whose export it begins; None = none.
        digest: of all that its result depends on.
    """

    settings: dict[str, Any]
    folder: Path
    config: dict[str, Any]
    shards: Path
    before: "Run | None"
    digest: str

    @property
    def export(self) -> Path:
        """The folder of its export."""
        return self.folder / "export"


class Study(NamedTuple):
    """What a study brings.

    Attributes:
        folder: where its grid.yaml and README.md lie.
        title: of the page.
        prepare: makes shard sets in a folder, by their names; told whether it is a quick try. A
            point has the one that its `data.shards` names, or the only one.
        measure: figures of a trained point, by name; told whether it is a quick try.
        columns: figures of the table, with their headings.
        curves: by title, figures that follow one another, each with its place in the order: a table
            and a plot of their own.
    """

    folder: Path
    title: str
    prepare: Callable[[Path, bool], dict[str, Path]]
    measure: Callable[[Trained, bool], Figures]
    columns: Mapping[str, str]
    curves: Mapping[str, Mapping[str, str]] = {}


def main(study: Study, arguments: Sequence[str] | None = None) -> int:
    """Run a study's command; give its exit status."""
    parser = argparse.ArgumentParser(description=study.title)
    parser.add_argument("--quick", action="store_true", help="a try of a minute; writes no results")
    parser.add_argument(
        "--variant",
        choices=variants(study.folder / "grid.yaml"),
        default="",
        metavar="NAME",
        help="runs of `variants` in grid.yaml, with a section and a page of their own",
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="runs and data (default runs/studies/NAME)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="README.md and result.html (default: its folder)"
    )
    options = parser.parse_args(arguments)
    parts = [study.folder.name, options.variant, "quick" if options.quick else ""]
    work: Path = options.work or Path("runs/studies") / "-".join(filter(None, parts))
    output: Path | None = options.output or (None if options.quick else study.folder)
    path = study.folder / "grid.yaml"
    grid = load_grid(path, quick=options.quick, variant=options.variant)
    results = run_points(study, grid, work, quick=options.quick)
    print(write_results(study.title, study.columns, grid, results, output, study.curves))
    return 0


def run_points(study: Study, grid: Grid, work: Path, *, quick: bool) -> list[dict[str, Any]]:
    """Results of all points, in the order of the grid."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "data").mkdir(exist_ok=True)
    prepared = study.prepare(work / "data", quick)
    points, results = list(grid.settings()), []
    for number, settings in enumerate(points, 1):
        run = plan_run(grid, settings, work / point_name(settings), prepared)
        result = _stored(run)
        if result is None:
            told = f"point {number} of {len(points)}: {run.folder.name}"
            print(told, file=sys.stderr, flush=True)
            started = time.monotonic()
            figures = study.measure(_train(run), quick)
            result = {
                "digest": run.digest,
                "settings": settings,
                "figures": figures,
                "seconds": round(time.monotonic() - started),
            }
            write_whole(run.folder / "result.json", json.dumps(result, indent=1).encode())
        results.append(result)
    return results


def plan_run(
    grid: Grid, settings: dict[str, Any], folder: Path, prepared: Mapping[str, Path]
) -> Run:
    """The run of a point, and the one before it, if it begins with that one's export."""
    config = configured(grid.run, grid.expanded(settings))
    config["run"] |= {"name": folder.name, "dir": str(folder / "run")}
    shards = prepared[settings.get("data.shards", next(iter(prepared)))]
    config["data"]["shards"] = str(shards)
    before = None
    if (name := settings.get(INIT_FROM)) is not None:
        seed = {SEED: settings[SEED]}
        its_folder = folder.parent / point_name({"pretrain": name} | seed)
        before = plan_run(grid, grid.pretrain[name] | seed, its_folder, prepared)
        config["train"][INIT_FROM.partition(".")[2]] = str(before.export)
    fingerprint = json.loads((shards / "manifest.json").read_text())["fingerprint"]
    digest = _digest([config, fingerprint, *([before.digest] if before else [])])
    return Run(settings, folder, config, shards, before, digest)


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


def _train(run: Run) -> Trained:
    """Train to the end, going on where a run of the same configuration stopped; and export."""
    folder, begun, ended = run.folder, run.folder / "digest", run.folder / "trained"
    if folder.exists() and (not begun.exists() or begun.read_text() != run.digest):
        shutil.rmtree(folder)  # of another configuration
    if not ended.exists():
        if run.before:
            _train(run.before)
        folder.mkdir(parents=True, exist_ok=True)
        begun.write_text(run.digest)
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(run.config, sort_keys=False))
        command("-m", "pipeline.train", str(path))
        shutil.rmtree(run.export, ignore_errors=True)
        command("-m", "pipeline.export", str(folder / "run"), str(run.export))
        ended.touch()
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return Trained(run.export, run.shards, [json.loads(line) for line in lines], run.settings)


def _stored(run: Run) -> dict[str, Any] | None:
    """The result of an earlier command, if it is of the same configuration and data."""
    try:
        result: dict[str, Any] = json.loads((run.folder / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("digest") == run.digest else None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
