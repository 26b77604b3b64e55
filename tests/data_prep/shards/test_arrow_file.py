"""One Arrow shard: layout, offsets, checksums."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from data_prep.errors import DataError
from data_prep.shards.arrow_file import ShardRows, read_shard, write_shard


def make_rows(dtype: type[np.uint16] | type[np.uint32]) -> ShardRows:
    """Three documents of 3, 1 and 4 tokens."""
    return ShardRows(
        tokens=np.arange(8, dtype=dtype) * 7000,
        offsets=np.array([0, 3, 4, 8]),
        src=np.array([0, 0, 1], np.uint32),
        row=np.array([0, 17, 5], np.uint64),
    )


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_recorded_offsets_point_at_the_buffers(
    tmp_path: Path, dtype: type[np.uint16] | type[np.uint32]
) -> None:
    """The raw bytes at the recorded offsets are the tokens and the row offsets."""
    rows = make_rows(dtype)
    written = write_shard(tmp_path / "a.arrow", rows, {"eos_id": "2"})
    content = (tmp_path / "a.arrow").read_bytes()
    assert written.bytes == len(content)
    tokens = np.frombuffer(content, dtype, written.tokens, written.values_offset)
    offsets = np.frombuffer(content, np.int64, written.rows + 1, written.offsets_offset)
    assert tokens.tolist() == rows.tokens.tolist()
    assert offsets.tolist() == rows.offsets.tolist()
    assert written.file_xxh3_128 == xxhash.xxh3_128_hexdigest(content)
    assert written.tokens_xxh3_128 == xxhash.xxh3_128_hexdigest(rows.tokens.tobytes())


def test_a_shard_is_one_plain_arrow_batch(tmp_path: Path) -> None:
    """Any Arrow reader sees one batch, documents as rows, nothing nullable, with metadata."""
    write_shard(tmp_path / "a.arrow", make_rows(np.uint16), {"eos_id": "2"})
    with pa.memory_map(str(tmp_path / "a.arrow")) as source:
        reader = pa.ipc.open_file(source)
        assert reader.num_record_batches == 1
        table = reader.read_all()
    assert table.schema.field("tokens").type == pa.large_list(
        pa.field("item", pa.uint16(), nullable=False)
    )
    assert not any(field.nullable for field in table.schema)
    assert table.column("tokens").to_pylist()[1] == [21000]
    assert table.column("row").to_pylist() == [0, 17, 5]
    rows, metadata = read_shard(tmp_path / "a.arrow")
    assert rows.src.tolist() == [0, 0, 1]
    assert metadata == {"eos_id": "2"}


def test_an_unwritable_folder_gives_one_line_and_no_file(tmp_path: Path) -> None:
    """A failed write names the path and leaves nothing under it."""
    (tmp_path / "blocked").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"cannot write .*a\.arrow"):
        write_shard(tmp_path / "blocked" / "a.arrow", make_rows(np.uint16), {})
    assert [path.name for path in tmp_path.iterdir()] == ["blocked"]
