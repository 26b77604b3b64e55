"""Whole builds: every token, every record, any number of workers, any kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from data_prep.building.build import build
from data_prep.building.options import BuildOptions
from data_prep.building.unit import is_held_out
from data_prep.errors import DataError
from data_prep.shards.manifest import Manifest, load_manifest
from data_prep.shards.shard_set import ShardSet
from data_prep.tokenization.tokenizer import Tokenizer, read_tokenizer
from data_prep.verify import find_problems
from data_prep.workers.progress import ProgressLine
from tests.data_prep.conftest import Silence

Build = Callable[..., Manifest]
Write = Callable[..., Path]
ReadTree = Callable[[Path], dict[str, bytes]]

SCRIPT = Path(__file__).parents[3] / "data_prep" / "shard.py"
UNIT_BYTES = 1 << 14


def stored_documents(directory: Path, split: str) -> list[str]:
    """Every document of a split, decoded, in stream order."""
    shards = ShardSet.open(directory, split)
    tokenizer = Tokenizer(shards.tokenizer_path.read_bytes(), None, "")
    documents: list[list[int]] = [[]]
    for token in shards.read(0, shards.num_tokens).tolist():
        if token == shards.eos_id:
            documents.append([])
        else:
            documents[-1].append(token)
    assert documents.pop() == [], "the stream ends with EOS"
    return [tokenizer.decode(ids) for ids in documents]


def expected_documents(texts: list[str], fraction: float, held_out: bool) -> list[str]:
    """The documents of one side of the split, in input order."""
    return [text for text in texts if text and is_held_out(text.encode(), fraction) == held_out]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=60), min_size=1, max_size=8),
    unit_bytes=st.integers(10, 200),
    shard_tokens=st.integers(1, 100),
)
def test_every_token_of_every_document(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], unit_bytes: int, shard_tokens: int
) -> None:
    """Whatever the texts and the cuts, the splits hold all documents, whole and in order."""
    texts = [*texts, "one document at least"]
    folder = tmp_path_factory.mktemp("property")
    path = folder / "a.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    with open(os.devnull, "w") as sink:
        options = BuildOptions(
            inputs=(path,), output=folder / "out", tokenizer="bytes", workers=1,
            validation_fraction=0.3, unit_bytes=unit_bytes, shard_tokens=shard_tokens,
        )  # fmt: skip
        manifest = build(options, ProgressLine(Console(file=sink)))
    for split, held_out in (("train", False), ("validation", True)):
        expected = expected_documents(texts, 0.3, held_out)
        stream = [token for text in expected for token in (*text.encode(), 256)]
        shards = ShardSet.open(folder / "out", split, verify=True)
        assert shards.read(0, shards.num_tokens).tolist() == stream
    assert all(shard.rows == 1 or shard.tokens <= shard_tokens for shard in manifest.shards)


def test_trained_tokenizer_round_trip(
    tmp_path: Path, texts: list[str], write_jsonl: Write, build_set: Build
) -> None:
    """With BPE trained on the corpus all documents come back, from more than one file and unit."""
    first, second = write_jsonl(texts[:200], "a.jsonl"), write_jsonl(texts[200:], "b.jsonl")
    manifest = build_set(
        first, second, tokenizer="train:500", validation_fraction=0.1, unit_bytes=4096
    )
    assert manifest.tokenizer.vocab_size == 500
    assert len({shard.unit for shard in manifest.shards}) > 3
    for split, held_out in (("train", False), ("validation", True)):
        assert stored_documents(tmp_path / "out", split) == expected_documents(texts, 0.1, held_out)
    held_out_share = manifest.splits["validation"].rows / len(texts)
    assert 0.05 < held_out_share < 0.16


def test_ledger_adds_up(tmp_path: Path, texts: list[str], build_set: Build) -> None:
    """In each file and in all, records = documents + empty + rejects, and each reject is listed."""
    good = [orjson.dumps({"text": text}) for text in texts]
    bad = [b'{"text": 1}', b"{", b'{"text": "\\udfff"}', b'{"text": "\xff"}', b"{}"]
    lines = [*good[:100], *bad, b'{"text": ""}', b"", *good[100:]]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "in" / "b.py").write_bytes(b"\xff")
    (tmp_path / "in" / "c.py").write_bytes(b"")
    (tmp_path / "in" / "d.py").write_bytes(b"pass\n")
    manifest = build_set(tmp_path / "in", max_bad_fraction=0.1, unit_bytes=1000)
    totals = manifest.totals
    assert totals.records == len(lines) + 3
    assert (totals.documents, totals.empty, totals.rejects) == (len(texts) + 1, 3, 6)
    by_file = {Path(entry.path).name: entry.ledger for entry in manifest.inputs}
    assert by_file["a.jsonl"].rejects_by_reason == {
        "'text' is not a string": 1,
        "lone surrogate": 1,
        "malformed JSON": 1,
        "no 'text'": 1,
        "not UTF-8": 1,
    }
    assert by_file["c.py"].empty == 1
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").open()]
    assert len(rejects) == totals.rejects
    content = (tmp_path / "in" / "a.jsonl").read_bytes()
    found = [content[entry["offset"] :].split(b"\n")[0] for entry in rejects[:5]]
    assert found == bad
    assert set(rejects[5]) == {"file", "offset", "reason", "sample", "records"}


def test_bad_record_policies(tmp_path: Path, build_set: Build) -> None:
    """Over the limit nothing is committed; a raised limit finishes; "fail" stops at the record."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 9 + b"{bad\n")
    with pytest.raises(DataError, match=r"1 of 10 records are bad .*--max-bad-fraction 0.001"):
        build_set(path)
    with pytest.raises(DataError, match="incomplete"):
        load_manifest(tmp_path / "out")
    assert "malformed" in (tmp_path / "out" / "rejects.jsonl").read_text()
    assert build_set(path, max_bad_fraction=0.1).totals.rejects == 1
    with pytest.raises(DataError, match=r"a\.jsonl: record at byte 126 is bad: malformed JSON"):
        build_set(path, output="other", on_bad="fail")
    with pytest.raises(DataError, match="1 records are bad"):
        build_set(path, on_bad="fail")


def test_binary_files_of_a_directory_do_not_fail_the_job(tmp_path: Path, build_set: Build) -> None:
    """Half of a directory being binary is counted and listed, and the rest is kept."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.py").write_bytes(b"\xff")
    (tmp_path / "in" / "b.py").write_bytes(b"pass\n")
    totals = build_set(tmp_path / "in").totals
    assert (totals.documents, totals.rejects) == (1, 1)


def test_a_corpus_without_documents_is_refused(tmp_path: Path, build_set: Build) -> None:
    """A wrong --text-key rejects every record and says where to look."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"body": "a"}\n')
    with pytest.raises(DataError, match="--text-key"):
        build_set(path, max_bad_fraction=1.0)


def test_same_bytes_for_any_number_of_workers(
    tmp_path: Path, texts: list[str], write_jsonl: Write, build_set: Build, read_tree: ReadTree
) -> None:
    """1, 2 and 5 workers write the same files to the byte, tokenizer training included."""
    path = write_jsonl(texts)
    for workers in (1, 2, 5):
        build_set(
            path, output=f"w{workers}", tokenizer="train:400", workers=workers, unit_bytes=3000
        )
    trees = [read_tree(tmp_path / f"w{workers}") for workers in (1, 2, 5)]
    assert len([name for name in trees[0] if name.endswith(".arrow")]) > 5
    assert trees[0] == trees[1] == trees[2]


def test_held_out_split_follows_the_text(
    tmp_path: Path, texts: list[str], write_jsonl: Write, build_set: Build
) -> None:
    """A document stays on its side of the split when the corpus around it changes."""
    build_set(write_jsonl(texts, "a.jsonl"), output="a", validation_fraction=0.2)
    build_set(write_jsonl(texts[::-2], "b.jsonl"), output="b", validation_fraction=0.2)
    first = set(stored_documents(tmp_path / "a", "validation"))
    second = set(stored_documents(tmp_path / "b", "validation"))
    assert second == first & set(texts[::-2])


def start_build(path: Path, output: Path, workers: int) -> "subprocess.Popen[bytes]":
    """Start the command line on a corpus in its own process."""
    command = [
        sys.executable, str(SCRIPT), "--input", str(path), "--output", str(output), "--tokenizer",
        "train:500", "--workers", str(workers), "--unit-bytes", str(UNIT_BYTES),
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_after(process: "subprocess.Popen[bytes]", output: Path, units: int) -> None:
    """Kill a build with SIGKILL once it has finished some units."""
    deadline = time.monotonic() + 60
    while len(list((output / "journal").glob("[0-9]*.json"))) < units:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()


def test_killed_twice_then_finished(
    tmp_path: Path, large_texts: list[str], write_jsonl: Write, build_set: Build,
    read_tree: ReadTree,
) -> None:  # fmt: skip
    """SIGKILL with 1 and with 2 workers, then a rerun: the bytes of an uninterrupted build.

    After each kill the set does not open, and the rerun keeps the finished units.
    """
    path, output = write_jsonl(large_texts), tmp_path / "killed"
    for workers, units in ((1, 3), (2, 12)):
        process = start_build(path, output, workers)
        kill_after(process, output, units)
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(DataError, match="incomplete"):
            ShardSet.open(output, "train")
    kept = {file.name: file.stat().st_mtime_ns for file in (output / "journal").glob("[0-9]*.json")}
    (output / "shards" / "train" / "corpus" / "00000.arrow.0123abcd.tmp").write_bytes(b"left over")
    options = {"tokenizer": "train:500", "unit_bytes": UNIT_BYTES}
    manifest = build_set(path, output="killed", **options)
    for name, time_ns in kept.items():
        assert (output / "journal" / name).stat().st_mtime_ns == time_ns
    assert len(kept) < len({shard.unit for shard in manifest.shards})
    build_set(path, output="straight", **options)
    assert read_tree(output) == read_tree(tmp_path / "straight")


def test_workers_end_with_their_parent(
    tmp_path: Path, large_texts: list[str], write_jsonl: Write
) -> None:
    """No worker outlives a killed build: the pipe they all hold closes within seconds."""
    process = start_build(write_jsonl(large_texts), tmp_path / "out", workers=2)
    kill_after(process, tmp_path / "out", 3)
    assert process.stderr is not None
    started = time.monotonic()
    # Reading to the end returns when the last process that inherited the pipe is gone.
    process.stderr.read()
    assert time.monotonic() - started < 10


def test_a_complete_set_is_left_alone(
    tmp_path: Path, texts: list[str], write_jsonl: Write, build_set: Build
) -> None:
    """The same command on a complete set changes no file; a damaged set is repaired by it."""
    path = write_jsonl(texts)
    manifest = build_set(path, unit_bytes=3000)
    shard = tmp_path / "out" / manifest.shards[1].path
    content, time_ns = shard.read_bytes(), shard.stat().st_mtime_ns
    assert build_set(path, unit_bytes=3000) == manifest
    assert shard.stat().st_mtime_ns == time_ns
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match="the manifest says"):
        ShardSet.open(tmp_path / "out", "train")
    build_set(path, unit_bytes=3000)
    assert shard.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "train:300"}, "tokenizer spec: bytes then, train:300 now"),
        ({"validation_fraction": 0.5}, "validation_fraction: 0.01 then, 0.5 now"),
        ({"text_key": "body"}, "text_key: 'text' then, 'body' now"),
    ],
)
def test_other_options_are_refused(
    texts: list[str], write_jsonl: Write, build_set: Build, change: dict[str, object], message: str
) -> None:
    """A set is never mixed from two sets of options; the message says which differ."""
    path = write_jsonl(texts)
    build_set(path)
    with pytest.raises(DataError, match=message):
        build_set(path, **change)


def test_other_inputs_are_refused(texts: list[str], write_jsonl: Write, build_set: Build) -> None:
    """Changed, new and missing input files are named."""
    first, second = write_jsonl(texts, "a.jsonl"), write_jsonl(texts, "b.jsonl")
    build_set(first)
    with pytest.raises(DataError, match=r"new inputs: .*b\.jsonl; gone inputs: .*a\.jsonl"):
        build_set(second)
    write_jsonl(texts[1:], "a.jsonl")
    with pytest.raises(DataError, match=r"changed inputs: .*a\.jsonl"):
        build_set(first)


class WriteDuring(Silence):
    """An observer that writes to an input when the first unit is on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def finish(self, input_bytes: int, tokens: int, rejects: int) -> None:
        """Append a record, once."""
        if self._path.exists():
            self._path.write_bytes(self._path.read_bytes() + b'{"text": "late"}\n')


def test_an_input_that_changes_after_its_unit_is_refused(
    tmp_path: Path, texts: list[str], write_jsonl: Write
) -> None:
    """A file that is written to after it was read is not committed, and its name is the error."""
    early, late = write_jsonl(texts, "a.jsonl"), write_jsonl(texts, "b.jsonl")
    # The early file is one unit, so that nothing opens it again.
    unit_bytes = early.stat().st_size
    options = BuildOptions(
        tmp_path / "out", "bytes", (early, late), workers=1, unit_bytes=unit_bytes
    )
    with pytest.raises(DataError, match=r"a\.jsonl changed while the job was running"):
        build(options, WriteDuring(early))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_foreign_folder_is_refused(tmp_path: Path, write_jsonl: Write, build_set: Build) -> None:
    """A folder with other things in it is not written to."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="not empty"):
        build_set(write_jsonl(["a"]))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_the_output_may_lie_in_the_input(tmp_path: Path, build_set: Build) -> None:
    """A set written below an input directory is not read as input by the next run."""
    (tmp_path / "a.py").write_bytes(b"pass\n")
    (tmp_path / "b.py").write_bytes(b"\xff")
    assert build_set(tmp_path) == build_set(tmp_path)


def test_fingerprint_follows_the_content(
    texts: list[str], write_jsonl: Write, build_set: Build
) -> None:
    """The same documents elsewhere have the same fingerprint; another order has another."""
    here, there = write_jsonl(texts, "a.jsonl"), write_jsonl(texts, "elsewhere/b.jsonl")
    other = write_jsonl(texts[::-1], "c.jsonl")
    prints = [
        build_set(path, output=f"out{number}").fingerprint
        for number, path in enumerate((here, there, other))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_tokenizer_file_is_copied_verbatim(
    tmp_path: Path, texts: list[str], write_jsonl: Write, build_set: Build
) -> None:
    """A set made with a tokenizer.json holds its exact bytes, and its text round-trips."""
    path = write_jsonl(texts)
    build_set(path, output="a", tokenizer="train:500")
    given = tmp_path / "a" / "tokenizer.json"
    (tmp_path / "given.json").write_bytes(given.read_bytes() + b"\n\n")
    manifest = build_set(path, output="b", tokenizer=str(tmp_path / "given.json"))
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == given.read_bytes() + b"\n\n"
    assert manifest.tokenizer.sha256 == read_tokenizer(tmp_path / "given.json").sha256
    assert stored_documents(tmp_path / "b", "train") == stored_documents(tmp_path / "a", "train")


def test_special_token_text_follows_the_option(
    tmp_path: Path, write_jsonl: Write, build_set: Build
) -> None:
    """Text that spells EOS is plain text, the id, or a reject, and each set verifies."""
    path = write_jsonl(["a", "b <|endoftext|> c", "d"])
    tokens, rejected = {}, {}
    for mode in ("text", "id", "reject"):
        manifest = build_set(
            path, output=mode, special_tokens=mode, validation_fraction=0, max_bad_fraction=1
        )
        assert list(find_problems(tmp_path / mode)) == []
        shards = ShardSet.open(tmp_path / mode, "train")
        tokens[mode] = shards.read(0, shards.num_tokens).tolist()
        rejected[mode] = manifest.totals.rejects_by_reason
    assert tokens["text"] == [97, 256, *b"b <|endoftext|> c", 256, 100, 256]
    assert tokens["id"] == [97, 256, *b"b ", 256, *b" c", 256, 100, 256]
    assert tokens["reject"] == [97, 256, 100, 256]
    assert rejected == {"text": {}, "id": {}, "reject": {"spells '<|endoftext|>'": 1}}
