"""Shard sets whose files were damaged: every reader gives what the set held, or one clear error."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import orjson
import pytest
from hypothesis import strategies as st

from data_prep import export_megatron, inspect, report, verify
from data_prep.building.build import build
from data_prep.building.options import BuildOptions, Source
from data_prep.loading.loader import BatchLayout, TokenLoader
from data_prep.loading.sequences import SequenceFormat
from data_prep.shards.shard_set import ShardSet
from tests.data_prep.conftest import Silence, make_texts
from tests.support.hostile import call_command, fuzzed, refusal_of, untouched

FORMATS = (
    SequenceFormat(sequence_length=64, future_tokens=2, packing="best_fit", documents=True),
    SequenceFormat(sequence_length=64, future_tokens=2, packing="concat", documents=True),
)


class Damage(NamedTuple):
    """What happens to one file of a set: `file`, `place` and `share` are parts of what there is."""

    how: str
    file: float
    other: float
    place: float
    share: float
    content: bytes


DAMAGE = st.builds(
    Damage,
    st.sampled_from(
        ["flip", "truncate", "extend", "swap", "delete", "patch", "empty", "folder", "link", "add"]
    ),
    *(st.floats(0, 1, exclude_max=True) for _ in range(3)),
    st.sampled_from([0.0, 0.001, 0.1, 0.9]),
    st.binary(min_size=1, max_size=9)
    | st.sampled_from([b"\0" * 64, b"\xff" * 64, b"9" * 400, b"../", b"\x1b[2J", b'"', b"-1"]),
)
# Values of manifest.json: each was found to be believed once, or might be.
VALUES: st.SearchStrategy[object] = st.sampled_from(
    [
        *(0, -1, 1, 1 << 31, 1 << 62, 1 << 63, 1 << 70, 0.5, 1e308, True, None, "", [], {}, "x"),
        *("../../etc/passwd", "/dev/zero", "a\nb", "a\x1b[2J", "uint16", "uint32", "x" * 3000),
    ]
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of two sources in several shards, with its corpus beside it."""
    folder = tmp_path_factory.mktemp("whole")
    sources = []
    for number, name in enumerate(("web", "code")):
        path = folder / f"{name}.jsonl"
        texts = make_texts(60, seed=number)
        path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
        sources.append(Source(name, (path,), weight=number + 1.0))
    options = BuildOptions(
        folder / "set", "bytes", sources=tuple(sources), workers=1, unit_bytes=4000,
        validation_fraction=0.2,
    )  # fmt: skip
    build(options, Silence())
    return folder / "set"


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Callable[[], Path]:
    """Copies of the set, one after the other in the same place."""
    place = tmp_path / "copy" / "set"

    def copy() -> Path:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, place)
        return place

    return copy


def files_of(directory: Path) -> list[Path]:
    """The files that the manifest lists, with itself and the tokenizer."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and "journal" not in path.parts and path.name != "rejects.jsonl"
    )


def damage(directory: Path, damages: Sequence[Damage]) -> None:
    """Let it happen."""
    for one in damages:
        files = files_of(directory)
        if not files:
            return
        path, other = files[int(one.file * len(files))], files[int(one.other * len(files))]
        content = path.read_bytes()
        first = int(one.place * len(content))
        if one.how == "swap":
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
        elif one.how in ("delete", "folder", "link"):
            path.unlink()
            if one.how == "folder":
                path.mkdir()
            elif one.how == "link":
                path.symlink_to(other.name)
        elif one.how == "add":
            (path.parent / "99999.arrow").write_bytes(content)
        else:
            last = min(len(content), first + max(1, int(one.share * len(content))))
            path.write_bytes(
                {
                    "flip": content[:first]
                    + bytes(value ^ one.content[0] for value in content[first : first + 1])
                    + content[first + 1 :],
                    "truncate": content[:first],
                    "extend": content + one.content,
                    "patch": content[:first] + one.content + content[last:],
                    "empty": b"",
                }[one.how]
            )


def read_all(directory: Path) -> list[bytes]:
    """What training would read of a set: the stream of each split, and the batches of an epoch."""
    found = []
    for split in ("train", "validation"):
        shards = ShardSet.open(directory, split, verify=True)
        try:
            found.append(shards.read(0, shards.num_tokens).tobytes())
            found.append(shards.document_lengths().tobytes())
            layout = BatchLayout(micro_size=2)
            for form in FORMATS:
                loader = TokenLoader(shards, form, layout, seed=3)
                for sample in range(0, loader.num_samples - 2, 2):
                    found += [
                        batch.tokens.numpy().tobytes() for batch in loader.step_batches(sample)
                    ]
        finally:
            shards.close()
    return found


def check(directory: Path, expected: list[bytes] | None) -> str:
    """Every reader ends well, changes nothing, and gives what the set held unless it refuses.

    Returns:
        The refusal of the loader; empty for none.
    """
    found: list[list[bytes]] = []
    with untouched(directory):
        refusal = refusal_of(lambda: found.append(read_all(directory))) or ""
        verified = call_command(verify.main, [str(directory)])
        call_command(inspect.main, [str(directory)])
        call_command(inspect.main, [str(directory), "--search", "loss", "--limit", "5"])
        call_command(inspect.main, [str(directory), "--document", "7", "--split", "validation"])
    if not refusal:
        assert expected is None or found == [expected]
    elif "no document" not in refusal:
        assert verified.code == 1, refusal
    if verified.code == 0:
        assert refusal == "", "verify finds what the loader refuses"
    return refusal


@fuzzed(60, damages=st.lists(DAMAGE, min_size=1, max_size=3))
def test_damaged_files(copied: Callable[[], Path], whole: Path, damages: list[Damage]) -> None:
    """Files flipped, cut, stretched, swapped, deleted, or replaced by folders and links."""
    directory = copied()
    before = {path.relative_to(directory): path.read_bytes() for path in files_of(directory)}
    damage(directory, damages)
    is_whole = all(
        (directory / name).is_file() and (directory / name).read_bytes() == content
        for name, content in before.items()
    )
    refusal = check(directory, read_all(whole))
    assert is_whole or refusal or call_command(verify.main, [str(directory)]).code == 1


@fuzzed(40, picks=st.lists(st.integers(0, 1 << 30), min_size=1, max_size=2), value=VALUES)
def test_edited_manifests(copied: Callable[[], Path], picks: list[int], value: object) -> None:
    """Any value of the manifest replaced, alone or with another."""
    directory = copied()
    path = directory / "manifest.json"
    manifest = orjson.loads(path.read_bytes())
    places = list(_places(manifest))
    for pick in picks:
        holder, key = places[pick % len(places)]
        holder[key] = value  # type: ignore[index]
    path.write_bytes(_as_json(manifest))
    check(directory, None)


def _places(value: object) -> Iterator[tuple[object, object]]:
    """Every list and mapping in a value, with each of its keys."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))  # type: ignore[arg-type]
    for key in list(keys):
        yield value, key
        inner = value[key]  # type: ignore[index]
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _as_json(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "shards"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_what_is_no_file(copied: Callable[[], Path], name: str, kind: str, tmp_path: Path) -> None:
    """A pipe nobody writes to, a folder, and a link to itself are refused, not waited for."""
    directory = copied()
    path = directory / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(name)
    check(directory, None)
    for main, arguments in (
        (report.main, ["--output", str(tmp_path / "page.html")]),
        (export_megatron.main, [str(tmp_path / "megatron")]),
    ):
        assert call_command(main, [str(directory), *arguments]).code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_the_whole_set_is_read(whole: Path) -> None:
    """What the damage above is done to has nothing wrong, and random bytes are no set."""
    assert check(whole, read_all(whole)) == ""
    assert len(files_of(whole)) > 10
    assert len(read_all(whole)) > 20


def test_random_bytes_are_no_set(copied: Callable[[], Path]) -> None:
    """Every file of the set is noise of its length."""
    directory = copied()
    for number, path in enumerate(files_of(directory)):
        path.write_bytes(random.Random(number).randbytes(path.stat().st_size))
    assert check(directory, None)
