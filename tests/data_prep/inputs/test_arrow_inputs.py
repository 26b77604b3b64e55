"""Parquet and Arrow files: every row once, the text column alone, damage counted."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import DataError
from data_prep.inputs import arrow_inputs
from data_prep.inputs.input_files import find_inputs
from data_prep.inputs.reading import TextReader
from data_prep.inputs.records import Reading
from data_prep.inputs.units import plan_units
from data_prep.shards.manifest import Manifest
from data_prep.verify import find_problems

Read = Callable[..., list[tuple[int, str | None, str]]]
Build = Callable[..., Manifest]

TEXTS = [f"row {number} naïve {'word ' * (number % 7)}" for number in range(100)]
NOT_A_STRING = "'text' is not a string"


def write_parquet(path: Path, column: Any, rows: int = 16) -> Path:
    """A file of several row groups with another column before the text."""
    table = pa.table({"id": pa.array(range(len(column))), "text": column})
    pq.write_table(table, path, row_group_size=rows)
    return path


def write_arrow(path: Path, columns: dict[str, Any], *, is_file: bool, rows: int = 16) -> Path:
    """An IPC file or stream of several batches."""
    table = pa.table(columns)
    new = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def texts_of(records: Sequence[tuple[int, str | None, str]]) -> list[str | None]:
    """The texts; offsets must count the rows."""
    assert [offset for offset, _, _ in records] == list(range(len(records)))
    return [text for _, text, _ in records]


@pytest.mark.parametrize("unit_bytes", [1, 700, 1 << 20])
def test_every_row_group_is_in_one_unit(
    tmp_path: Path, read_records: Read, unit_bytes: int
) -> None:
    """However a .parquet file is cut by bytes, each row comes once, in order."""
    path = write_parquet(tmp_path / "a.parquet", pa.array(TEXTS))
    assert texts_of(read_records(path, unit_bytes=unit_bytes)) == TEXTS
    if unit_bytes == 700:
        assert len(plan_units(find_inputs([path]), unit_bytes)) > 3


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()]
)
@pytest.mark.parametrize("form", ["parquet", "file", "stream"])
def test_text_of_every_type(tmp_path: Path, read_records: Read, kind: Any, form: str) -> None:
    """All string and binary types give the text; nulls and bytes that are not UTF-8 are rejects."""
    contents: list[Any] = [text.encode() for text in TEXTS[:40]]
    column = pa.array(contents, pa.binary()).cast(kind)
    column = pa.concat_arrays([column, pa.nulls(1, kind), column.slice(5, 3)])
    if kind in (pa.binary(), pa.large_binary()):
        column = pa.concat_arrays([column, pa.array([b"\xff"], kind)])
    path = tmp_path / ("a.parquet" if form == "parquet" else "a.arrow")
    if form == "parquet":
        write_parquet(path, column)
    else:
        write_arrow(path, {"n": pa.nulls(len(column)), "text": column}, is_file=form == "file")
    records = read_records(path)
    bad = [reason for _, _, reason in records if reason]
    assert texts_of(records)[:44] == [*TEXTS[:40], None, *TEXTS[5:8]]
    assert bad == [NOT_A_STRING, "not UTF-8"][: len(bad)]
    assert len(bad) == (2 if kind in (pa.binary(), pa.large_binary()) else 1)


def test_nested_and_dictionary_columns(tmp_path: Path, read_records: Read) -> None:
    """A key with dots goes into structures, a literal one wins, and dictionaries are resolved."""
    nested = pa.array([{"text": text} for text in TEXTS[:9]] + [None])
    repeated = pa.array([TEXTS[number % 3] for number in range(10)]).dictionary_encode()
    columns = {"meta": nested, "text": repeated}
    reading = Reading("meta.text")
    for path in (
        write_arrow(tmp_path / "a.arrow", columns, is_file=True, rows=4),
        write_arrow(tmp_path / "b.arrow", columns, is_file=False, rows=4),
    ):
        assert texts_of(read_records(path, reading=reading)) == [*TEXTS[:9], None]
        assert texts_of(read_records(path)) == [TEXTS[number % 3] for number in range(10)]
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert texts_of(read_records(tmp_path / "a.parquet", reading=reading)) == [*TEXTS[:9], None]
    columns["meta.text"] = pa.array(["literal"] * 10)
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    assert texts_of(read_records(tmp_path / "b.parquet", reading=reading)) == ["literal"] * 10


@pytest.mark.parametrize("is_file", [True, False])
def test_a_truncated_arrow_file_keeps_what_is_there(
    tmp_path: Path, read_records: Read, is_file: bool
) -> None:
    """Cut anywhere behind the schema, whole batches before the cut stay and the cut is counted."""
    path = write_arrow(tmp_path / "a.arrow", {"text": pa.array(TEXTS)}, is_file=is_file)
    content = path.read_bytes()
    counts = set()
    for cut in range(400, len(content), 171):
        path.write_bytes(content[:cut])
        records = read_records(path)
        assert records[-1][2] == "truncated .arrow"
        texts = texts_of(records)[:-1]
        assert texts == TEXTS[: len(texts)]
        counts.add(len(texts))
    assert len(counts) > 3
    path.write_bytes(content)
    assert texts_of(read_records(path)) == TEXTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_a_batch_with_damaged_offsets_costs_no_other(
    tmp_path: Path, read_records: Read, kind: Any
) -> None:
    """Offsets past the end of the text are rejects, not a crash; the other batches are read."""
    path = write_arrow(tmp_path / "a.arrow", {"text": pa.array(TEXTS, kind)}, is_file=True)
    with pa.memory_map(str(path)) as mapped:
        whole = mapped.read_buffer(mapped.size())
        offsets = pa.ipc.open_file(mapped).get_batch(2).column("text").buffers()[1]
        start = offsets.address - whole.address
    content = bytearray(path.read_bytes())
    content[start + 20 : start + 36] = b"\x7f" * 16
    path.write_bytes(content)
    records = read_records(path)
    assert [text for _, text, _ in records] == [*TEXTS[:32], *[None] * 16, *TEXTS[48:]]
    assert {reason[:16] for _, text, reason in records if text is None} == {"damaged .arrow ("}


def test_a_damaged_row_group_costs_no_other(tmp_path: Path, read_records: Read) -> None:
    """Rows that cannot be decoded are counted one by one; all other row groups are read."""
    path = write_parquet(tmp_path / "a.parquet", pa.array(TEXTS))
    group = pq.ParquetFile(path).metadata.row_group(2)
    content = bytearray(path.read_bytes())
    start = group.column(1).dictionary_page_offset
    content[start : start + 12] = b"\xff" * 12
    path.write_bytes(bytes(content))
    records = read_records(path)
    assert [text for _, text, _ in records] == [*TEXTS[:32], *[None] * 16, *TEXTS[48:]]
    reasons = {reason for _, text, reason in records if text is None}
    assert len(reasons) == 1
    assert reasons.pop().startswith("damaged .parquet row group 2 (")


def test_giant_rows_are_rejected(tmp_path: Path, read_records: Read) -> None:
    """A row above the limit is a reject beside others of its batch."""
    path = write_parquet(tmp_path / "a.parquet", pa.array(["a", "x" * 61, "b"]))
    reading = Reading("text", max_document_bytes=60)
    records = read_records(path, reading=reading)
    assert texts_of(records) == ["a", None, "b"]
    assert records[1][2] == reading.too_long


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        (b"PAR1", "text", "not a whole .parquet file"),
        (None, "body", r"no column 'body'; it has id, text: name the text with --text-key"),
        (None, "id", r"column 'id' of .* is int64, not text"),
    ],
)
def test_unusable_files_are_refused(
    tmp_path: Path, read_records: Read, content: bytes | None, key: str, message: str
) -> None:
    """A file cut short, without the column, or with numbers in it, says what to do."""
    path = write_parquet(tmp_path / "a.parquet", pa.array(TEXTS))
    if content is not None:
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=message):
        read_records(path, reading=Reading(key))


def test_what_is_no_arrow_is_refused(tmp_path: Path, read_records: Read) -> None:
    """Another format under the name, or a file cut inside its schema, ends the job with a line."""
    path = tmp_path / "a.arrow"
    path.write_bytes(b"not an Arrow file at all, only some text")
    with pytest.raises(DataError, match="cannot read"):
        read_records(path)


def test_sets_of_rows_verify(tmp_path: Path, build_set: Build) -> None:
    """A set from both formats verifies against its rows, found again by their numbers."""
    parquet = write_parquet(tmp_path / "a.parquet", pa.array(TEXTS[:50]))
    arrow = write_arrow(tmp_path / "b.arrow", {"text": pa.array(TEXTS[50:])}, is_file=False)
    manifest = build_set(parquet, arrow, unit_bytes=700)
    assert [entry.ledger.documents for entry in manifest.inputs] == [50, 50]
    assert list(find_problems(tmp_path / "out")) == []
    file, _ = find_inputs([parquet, arrow])
    assert TextReader().read(file, 33, Reading("text")) == TEXTS[33].encode()
    assert TextReader().read(file._replace(bytes=1), 33, Reading("text")) is None


def test_verify_decodes_a_row_group_once(
    tmp_path: Path, build_set: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many documents are compared with their rows; they may come in any order."""
    path = write_parquet(tmp_path / "a.parquet", pa.array(TEXTS), rows=25)
    build_set(path, validation_fraction=0)
    decoded = []
    real = arrow_inputs._read_group

    def counted(parquet: Any, number: int, *rest: Any) -> Any:
        decoded.append(number)
        return real(parquet, number, *rest)

    monkeypatch.setattr(arrow_inputs, "_read_group", counted)
    assert list(find_problems(tmp_path / "out")) == []
    assert decoded == [0, 1, 2, 3]
    (file,) = find_inputs([path])
    reader = TextReader()
    for row in (99, 3, 4, 80, 24, 25, 0):
        assert reader.read(file, row, Reading("text")) == TEXTS[row].encode()


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("column", "what"),
    [
        (pa.array(["x"]), "string"),
        (pa.array([["x"]]), "list<"),
        (pa.array(["x"]).dictionary_encode(), "dictionary<"),
        (pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())), "map<"),
    ],
)
def test_a_key_below_what_has_no_parts(
    tmp_path: Path, read_records: Read, form: str, column: Any, what: str
) -> None:
    """A key a.b where a is text, a list or a dictionary: the type of a is named."""
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        pq.write_table(pa.table({"a": column}), path)
    else:
        write_arrow(path, {"a": column}, is_file=True)
    with pytest.raises(DataError, match=rf"no column 'a.b': 'a' is {what}.*no parts with names"):
        read_records(path, reading=Reading("a.b"))


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_two_columns_of_one_name(
    tmp_path: Path, read_records: Read, form: str, is_nested: bool
) -> None:
    """Which of them is meant is not known; a repeated name of another column is no fault."""
    pair = [pa.array(["x"]), pa.array(["y"])]
    table = pa.table([*pair, pa.array(["z"])], names=["o", "o", "text"])
    key = "o"
    if is_nested:
        table = pa.table([pa.StructArray.from_arrays(pair, names=["o", "o"])], names=["s"])
        key = "s.o"
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match="has 2 columns of the name 'o'; rename"):
        read_records(path, reading=Reading(key))
    if not is_nested:
        assert texts_of(read_records(path)) == ["z"]


def test_names_of_columns_are_listed_in_part(tmp_path: Path, read_records: Read) -> None:
    """A thousand columns, and one with a page for a name, still give one line."""
    names = ["x" * 5000, *(f"c{number}" for number in range(1000))]
    path = write_arrow(
        tmp_path / "a.arrow", {name: pa.array(["t"]) for name in names}, is_file=True
    )
    with pytest.raises(DataError, match=r"c1, .* and 989 more") as caught:
        read_records(path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("key", ["body", "id", "text.body"])
def test_the_name_of_a_file_stays_in_one_line(tmp_path: Path, read_records: Read, key: str) -> None:
    """A line end in it would make two errors of one."""
    path = write_parquet(tmp_path / "a\nb.parquet", pa.array(TEXTS))
    with pytest.raises(DataError) as caught:
        read_records(path, reading=Reading(key))
    assert "\n" not in str(caught.value)
    assert r"a\nb.parquet" in str(caught.value)
