"""A build killed before any of its file operations goes on to the same bytes."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from data_prep.errors import DataError
from data_prep.shards.manifest import load_manifest

ROOT = Path(__file__).parents[3]
UNIT_BYTES = 12000
RANDOM_KILLS = 6
SHAPE = ("--tokenizer", "bytes", "--workers", "1", "--unit-bytes", str(UNIT_BYTES), "--dedup")

# Runs builds in forks of one process. An audit hook sees every open, rename, removal and new
# folder below the output before it happens, and at the chosen one kills the process.
DRIVER = """
import json, os, signal, sys
from data_prep.shard import main

def run(output, arguments, kill_at):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    events = []
    def watch(event, details):
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            return
        paths = [str(part) for part in details if isinstance(part, (str, os.PathLike))]
        if not any((path + "/").startswith(output + "/") for path in paths):
            return
        if len(events) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        events.append([event, paths[-1] if event == "os.rename" else paths[0]])
    sys.addaudithook(watch)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    status = main(["--output", output, *arguments])
    if kill_at < 0:
        with open(output + ".events", "w") as file:
            json.dump(events, file)
    os._exit(status)

for line in sys.stdin:
    order = json.loads(line)
    print(run(order["output"], order["arguments"], order["kill_at"]), flush=True)
"""


class Builds:
    """Builds that run, and die, in processes of their own."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        self._process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, output: Path, kill_at: int = -1) -> int:
        """Build into a folder, killed before file operation `kill_at`; gives the exit status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"output": str(output), "arguments": self._arguments, "kill_at": kill_at}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


class Operation(NamedTuple):
    """One file operation of a build."""

    event: str
    path: str


def test_killed_before_any_file_operation(
    tmp_path: Path, texts: list[str], write_jsonl: Callable[..., Path],
    read_tree: Callable[[Path], dict[str, bytes]],
) -> None:  # fmt: skip
    """Killed before every rename and at random points, some twice, a build ends alike.

    Among the points are those between a shard and its journal entry, and before the manifest. A
    killed build never opens, and no temporary file outlives the rerun.
    """
    path = write_jsonl(texts[:80] + texts[:20])
    path.write_bytes(path.read_bytes() + b"bad\n")
    builds = Builds(["--input", str(path), *SHAPE, "--max-bad-fraction", "1"])
    straight = tmp_path / "straight"
    assert builds.run(straight) == 0
    operations = [
        Operation(event, os.path.relpath(name, straight))
        for event, name in json.loads((tmp_path / "straight.events").read_text())
    ]
    renamed = [number for number, event in enumerate(operations) if event.event == "os.rename"]
    named = {operations[number].path for number in renamed}
    assert {"manifest.json", "rejects.jsonl", "journal/00001.json", "journal/units.jsonl"} <= named
    expected = read_tree(straight)
    others = [number for number in range(len(operations)) if number not in renamed]
    rng = random.Random(20)
    for point in sorted(renamed + rng.sample(others, RANDOM_KILLS)):
        output = tmp_path / f"killed-{point}"
        assert builds.run(output, kill_at=point) == -9
        if (output / "manifest.json").exists():
            assert point > operations.index(Operation("os.rename", "manifest.json"))
        else:
            with pytest.raises(DataError):
                load_manifest(output)
        if point % 3 == 0:
            builds.run(output, kill_at=rng.randrange(point + 1))
        assert builds.run(output) == 0
        tree = read_tree(output)
        assert tree.keys() == expected.keys()
        assert {name for name in tree if tree[name] != expected[name]} == set()
    builds.close()
