"""Builds that fail: early, with what to do, and without claiming the output."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from data_prep.errors import BadRecordsError, DataError
from data_prep.shards.manifest import Manifest
from tests.support.long_forms import part_of

Build = Callable[..., Manifest]
Write = Callable[..., Path]

MEASURED_BUILD = """
import resource, sys
from data_prep.shard import main
status = main(sys.argv[1:])
print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_wrong_key_stops_at_the_first_unit(tmp_path: Path, build_set: Build) -> None:
    """The error names the option and the keys that the records do have; later units are not read.

    The corrected command takes the same output.
    """
    path = tmp_path / "a.jsonl"
    record = {"id": 7, "content": "words", "meta": {"title": "t", "n": 1}}
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for _ in range(1000)))
    with pytest.raises(BadRecordsError, match=r"--text-key text; .* at content, meta\.title: name"):
        build_set(path, unit_bytes=20_000)
    assert not list((tmp_path / "out" / "journal").glob("0*.json"))
    manifest = build_set(path, unit_bytes=20_000, text_key="content")
    assert manifest.totals.documents == 1000


def test_a_first_command_that_fails_does_not_claim_the_output(
    tmp_path: Path, texts: list[str], write_jsonl: Write, build_set: Build
) -> None:
    """A wrong key, then another tokenizer: as long as there is no shard, options may change."""
    path = write_jsonl(texts[:50])
    with pytest.raises(DataError, match="is below 257"):
        build_set(path, tokenizer="train:100")
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadRecordsError):
        build_set(path, tokenizer="train:300", text_key="body")
    expected = build_set(path, tokenizer="train:280", output="fresh")
    assert build_set(path, tokenizer="train:280") == expected
    with pytest.raises(DataError, match="other inputs or options"):
        build_set(path, tokenizer="train:290")


@pytest.mark.parametrize("line", part_of((b'{"id": 1}\n', b"bad\n"), lambda number, _: number == 0))
def test_memory_does_not_grow_with_rejects(tmp_path: Path, line: bytes) -> None:
    """Half a million bad records take about as much memory as a tenth of that."""
    peaks = []
    for count in (50_000, 500_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_bytes(line * count)
        done = subprocess.run(
            [
                sys.executable, "-c", MEASURED_BUILD, "--input", str(path), "--tokenizer", "bytes",
                "--output", str(tmp_path / f"out-{count}"), "--workers", "1",
                "--max-bad-fraction", "1", "--unit-bytes", str(1 << 30),
            ],
            cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True,
        )  # fmt: skip
        status, peak = done.stdout.split()[-2:]
        assert status == "1"
        assert "none of the" in done.stderr
        peaks.append(int(peak) * 1024)
    # The difference may be a batch's worth: a megabyte of lines and its rejects.
    assert peaks[1] - peaks[0] < 150_000_000
