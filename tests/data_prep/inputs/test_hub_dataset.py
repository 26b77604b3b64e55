"""Datasets by name: the files of the split that was asked for, pinned, restartable, offline."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import DataError
from data_prep.inputs.hub_dataset import find_dataset_files
from data_prep.shards.manifest import Manifest, load_manifest
from tests.support.hub_server import Hub, serve

ROOT = Path(__file__).parents[3]
# What a worker does on a machine that has no copy of the files yet.
READ_UNITS = """
import sys
from pathlib import Path
from data_prep.building.plan import UnitList
from data_prep.inputs.reading import read_unit
from data_prep.inputs.records import Reading

units = UnitList(Path(sys.argv[1]))
found = [read_unit(units[number].unit, Reading("text")) for number in range(len(units))]
print(sum(len(batch.texts) for batches in found for batch in batches))
"""
CARD = b"""---
configs:
- config_name: web
  data_files:
  - {split: train, path: "web/train-*.jsonl.gz"}
  - {split: test, path: web/test.jsonl}
- config_name: books
  data_files: [{split: train, path: books/*.parquet}]
- config_name: tables
  data_files: [{split: train, path: tables.csv}]
---
"""


def lines(*texts: str) -> bytes:
    """A .jsonl file."""
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def parquet(tmp_path: Path, texts: list[str]) -> bytes:
    """A .parquet file of many row groups."""
    path = tmp_path / "made.parquet"
    pq.write_table(pa.table({"n": list(range(len(texts))), "text": texts}), path, row_group_size=10)
    return path.read_bytes()


@pytest.fixture
def files(tmp_path: Path, texts: list[str]) -> dict[str, bytes]:
    """A dataset of three configurations."""
    import gzip

    return {
        "README.md": CARD,
        "web/train-00000.jsonl.gz": gzip.compress(lines(*texts[:20])),
        "web/train-00001.jsonl.gz": gzip.compress(lines(*texts[20:40])),
        "web/test.jsonl": lines("held", "out") + b"not json\n",
        "books/a.parquet": parquet(tmp_path, texts[40:170]),
        "books/b.parquet": parquet(tmp_path, texts[170:300]),
        "tables.csv": b"a,b\n1,2\n",
    }


@pytest.fixture
def folder(tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as a folder of this machine, without a network."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "dataset"
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub without datasets."""
    with serve() as server:
        yield server


def run_python(hub: Hub | None, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a cache of its own, with the Hub or without one."""
    environment = os.environ | {"HF_HOME": str(home), "PYTHONWARNINGS": "ignore"}
    environment["HF_ENDPOINT"] = hub.address if hub else "http://127.0.0.1:9"
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


def shard(
    tmp_path: Path, hub: Hub | None, name: str, *more: str
) -> subprocess.CompletedProcess[str]:
    """Build a set of small units."""
    options = ["--input", name, "--tokenizer", "bytes", "--unit-bytes", "3000", *more]
    return run_python(hub, tmp_path / "home", "data_prep/shard.py", *options)


def test_a_split_of_a_folder_is_its_files(folder: Path, build_set: Callable[..., Manifest]) -> None:
    """The same bytes as from the files by their paths, and bad records cost no others."""
    names = find_dataset_files(Path(f"hf:{folder}:web@train"))
    assert names == [str(folder / f"web/train-0000{number}.jsonl.gz") for number in (0, 1)]
    by_name = build_set(Path(f"hf:{folder}:books"), unit_bytes=1000)
    by_path = build_set(folder / "books" / "a.parquet", folder / "books" / "b.parquet",
                        output="paths", unit_bytes=1000)  # fmt: skip
    assert by_name == by_path
    assert by_name.totals.documents == 260
    test = build_set(Path(f"hf:{folder}:web@test"), output="test", max_bad_fraction=1.0)
    assert (test.totals.documents, test.totals.rejects) == (2, 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf:{}:web", ["has the splits train, test; name one, for example", ":web@train"]),
        ("hf:{}:web@dev", ["no split 'dev'; there are train, test"]),
        ("hf:{}:none@train", ["cannot be opened", "'none' not found", "web", "check the name"]),
        ("hf:{}", ["cannot be opened", "Config name is missing"]),
        ("hf:{}:tables", ["tables.csv", "not read; read are .jsonl", "convert it"]),
        ("hf:{}:web@train#abc", ["is a folder and has no revisions"]),
        ("hf:a:b:c", ["hf:NAME[:CONFIG][@SPLIT][#REVISION]"]),
        ("hf:", ["hf:NAME[:CONFIG][@SPLIT][#REVISION]"]),
    ],
)
def test_what_cannot_be_read_is_one_line(folder: Path, name: str, words: list[str]) -> None:
    """Each names what was given, and what there is instead."""
    given = name.format(folder)
    with pytest.raises(DataError) as caught:
        find_dataset_files(Path(given))
    message = str(caught.value)
    assert message.startswith(f"--input {given}")
    assert len(message.splitlines()) == 1
    assert all(word in message for word in words), message


@pytest.mark.stress
def test_a_dataset_of_the_hub_is_pinned_to_its_commit(
    tmp_path: Path, hub: Hub, files: dict[str, bytes], read_tree: Callable[[Path], dict[str, Any]]
) -> None:
    """Any number of workers and a restart give the same bytes; a new commit is other input.

    A worker without a copy of a file fetches it; the commit that the build was begun with can be
    named; a finished set can be checked without the Hub.
    """
    old = hub.publish("org/name", files)
    output = tmp_path / "out"
    done = shard(tmp_path, hub, "hf:org/name:books", "--output", str(output), "--workers", "2")
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(output)
    prefix = f"hf://datasets/org/name@{old}/books"
    assert [entry.path for entry in manifest.inputs] == [
        f"{prefix}/a.parquet",
        f"{prefix}/b.parquet",
    ]
    assert len({entry.unit for entry in manifest.shards}) > 5

    # Another machine with a cache of its own finishes what was killed half-way.
    home = tmp_path / "home"
    shutil.rmtree(home)
    again = tmp_path / "again"
    shutil.copytree(output, again)
    (again / "manifest.json").unlink()
    for number in range(5, 10):
        (again / "journal" / f"{number:05d}.json").unlink()
    changed = hub.publish("org/name", files | {"books/b.parquet": files["books/a.parquet"]})
    refused = shard(tmp_path, hub, "hf:org/name:books", "--output", str(again), "--workers", "1")
    assert refused.returncode == 1
    assert f"new inputs: hf://datasets/org/name@{changed}/books/a.parquet" in refused.stderr
    assert f"gone inputs: {prefix}/a.parquet" in refused.stderr
    name = f"hf:org/name:books#{old}"
    done = shard(tmp_path, hub, name, "--output", str(again), "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert read_tree(again) == read_tree(output)

    shutil.rmtree(home)
    read = run_python(hub, home, "-c", READ_UNITS, str(again))
    assert (read.stdout, read.stderr) == ("260\n", "")

    verified = run_python(None, home, "-m", "data_prep.verify", str(again))
    assert verified.returncode == 0, verified.stderr


@pytest.mark.stress
def test_unknown_and_unreachable_names_are_one_line(tmp_path: Path, hub: Hub) -> None:
    """With the way around it where there is no network, and no output begun."""
    for server, words in ((hub, "doesn't exist on the Hub"), (None, "Couldn't reach")):
        done = shard(tmp_path, server, "hf:org/none", "--output", str(tmp_path / "out"))
        assert done.returncode == 1
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, done.stderr
        assert "--input hf:org/none cannot be opened" in errors[0]
        assert words in errors[0]
        assert "hf download org/none" in errors[0]
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
