"""The inspect command: documents with their origin, and where a text occurs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import inspect as inspect_module
from data_prep.inspect import find_document, main, search
from data_prep.shards.manifest import Manifest
from data_prep.shards.shard_set import ShardSet


@pytest.fixture
def directory(texts: list[str], build_mixture: Callable[..., Path]) -> Path:
    """Two sources in many small shards."""
    return build_mixture(web=texts[:60], code=[f"def {text}" for text in texts[60:90]])


def test_every_document_is_shown_with_its_origin(directory: Path, texts: list[str]) -> None:
    """Numbers run over shards and sources; the origin is the record in the input file."""
    found = []
    for split in ("train", "validation"):
        shards = ShardSet.open(directory, split)
        for number in range(shards.num_documents):
            document = find_document(shards, number)
            assert document.number == number
            path, _, offset = document.origin.rpartition(":")
            with open(path, "rb") as file:
                file.seek(int(offset))
                line = file.readline().decode()
            assert document.text.split("\n")[0].split(" ")[0] in line
            assert document.num_tokens == len(document.text.encode()) + 1
            assert document.source == Path(path).stem
            found.append(document.text)
    assert sorted(found) == sorted(texts[:60] + [f"def {text}" for text in texts[60:90]])


def test_a_document_on_the_command_line(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within one source numbers start at 0; one past the end is refused with the range."""
    assert main([str(directory), "--source", "code", "--document", "0"]) == 0
    out = capsys.readouterr().out
    assert "source    code" in out
    assert "code.jsonl:" in out
    assert "\ndef " in out
    assert main([str(directory), "--document", "500"]) == 1
    assert "has documents 0 to" in capsys.readouterr().err
    assert main([str(directory), "--document", "-1"]) == 1
    assert main([str(directory), "--source", "book"]) == 1
    assert "no source 'book'; it has web, code" in capsys.readouterr().err


def test_searching_finds_all_and_says_when_it_stops(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every document with the text, in order, up to the limit; none is exit status 1."""
    shards = ShardSet.open(directory, "train")
    expected = [n for n in range(shards.num_documents) if "数据" in find_document(shards, n).text]
    assert [document.number for document in search(shards, "数据")] == expected
    assert len(expected) > 3
    assert main([str(directory), "--search", "数据", "--limit", "2"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [int(line.split("\t")[0]) for line in lines] == expected[:2]
    assert all("数据" in line.split("\t", 3)[3] for line in lines)
    assert "stopped after 2" in captured.err
    assert main([str(directory), "--search", "nowhere to be found"]) == 1
    assert "no document of" in capsys.readouterr().err
    assert main([str(directory), "--search", ""]) == 1


def test_a_summary_is_the_default(
    tmp_path: Path,
    texts: list[str],
    write_jsonl: Callable[..., Path],
    build_set: Callable[..., Manifest],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a question: the split, its tokenizer, its sources."""
    manifest = build_set(write_jsonl(texts[:20]), source="tales", validation_fraction=0)
    capsys.readouterr()
    assert main([str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "source tales: 20 documents" in out
    assert f"{manifest.splits['train'].tokens:,} tokens" in out
    assert manifest.fingerprint[:16] in out or manifest.splits["train"].fingerprint[:16] in out


def test_a_long_search_says_how_far_it_is(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Now and then a line, beside what is found."""
    monkeypatch.setattr(inspect_module, "SECONDS_BETWEEN_LINES", 0.0)
    assert main([str(directory), "--search", "nowhere in it"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("searched 0 of ")
    assert lines[-1].startswith("no document of ")
