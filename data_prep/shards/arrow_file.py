"""One shard: an Arrow IPC FILE with one record batch, one document per row.

The columns are `tokens` (large_list of uint16 or uint32, EOS included), `src` (index of the input
file in the manifest) and `row` (byte offset of the record in it). Nothing is nullable, so there
are no validity bitmaps: the values buffer is one contiguous run of tokens whose absolute file
offset is recorded, and readers need `pread` only.

Shards of prompts and completions have one more column, `targets` (large_list of bool, as long as
`tokens`): which tokens are targets, one bit each, the first in the lowest bit of a byte. Its offset
is recorded, too.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from data_prep.shards.atomic import whole_file
from data_prep.tokenization.tokenizer import TokenArray

MAGIC = b"ARROW1"
COLUMNS = ["tokens", "src", "row"]


class ShardRows(NamedTuple):
    """Documents as columns: `tokens` flat, row i is tokens[offsets[i]:offsets[i + 1]].

    `targets` says of each token whether it is a target; None = all are.
    """

    tokens: TokenArray
    offsets: NDArray[np.int64]
    src: NDArray[np.uint32]
    row: NDArray[np.uint64]
    targets: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class TargetsColumn:
    """Where a shard says which tokens are targets.

    Attributes:
        count: Tokens that are.
        offset: Absolute offset of the bits in the file, in bytes.
        xxh3_128: Checksum of the bits, in whole bytes.
    """

    count: int
    offset: int
    xxh3_128: str


class ShardFile(NamedTuple):
    """What the manifest records about one written file; offsets are absolute, in bytes."""

    bytes: int
    rows: int
    tokens: int
    values_offset: int
    offsets_offset: int
    tokens_xxh3_128: str
    file_xxh3_128: str
    targets: TargetsColumn | None = None


def write_shard(path: Path, rows: ShardRows, metadata: Mapping[str, str]) -> ShardFile:
    """Write one shard, whole or not at all.

    Args:
        path: The final name.
        rows: The documents; `offsets` starts at 0 and ends at the number of tokens.
        metadata: Schema metadata that makes a lone shard self-describing.

    Returns:
        Sizes, buffer offsets and checksums of the file.

    Raises:
        DataError: The file cannot be written.
    """
    assert int(rows.offsets[0]) == 0, rows.offsets[0]
    assert int(rows.offsets[-1]) == len(rows.tokens), (rows.offsets[-1], len(rows.tokens))
    schema = _schema(rows.tokens.dtype, metadata, with_targets=rows.targets is not None)
    documents = pa.LargeListArray.from_arrays(
        _view(rows.offsets), _view(rows.tokens), type=schema.field("tokens").type
    )
    columns = [documents, _view(rows.src), _view(rows.row)]
    if rows.targets is not None:
        columns.append(_target_lists(rows.targets, rows.offsets, schema.field("targets").type))
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    with whole_file(path) as temporary:
        with open(temporary, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch)
        written = _describe(temporary)
        expected = xxhash.xxh3_128_hexdigest(rows.tokens.view(np.uint8).data)
        assert written.tokens_xxh3_128 == expected, (path, written.tokens_xxh3_128, expected)
    return written


def read_shard(path: Path) -> tuple[ShardRows, dict[str, str]]:
    """Map a shard and give its columns (views of the file) and metadata; for tools, not training.

    Raises:
        OSError: Not an Arrow file, or cut short.
        ValueError: An Arrow file of another layout.
    """
    with pa.memory_map(os.fspath(path)) as mapped:
        batch, schema = _single_batch(mapped)
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        documents = batch.column("tokens")
        rows = ShardRows(
            tokens=documents.values.to_numpy(zero_copy_only=True),
            offsets=documents.offsets.to_numpy(zero_copy_only=True),
            src=batch.column("src").to_numpy(zero_copy_only=True),
            row=batch.column("row").to_numpy(zero_copy_only=True),
            targets=_read_targets(batch),
        )
        return rows, metadata


def _view(values: NDArray[Any]) -> Any:
    """An Arrow array on the memory of `values`; `pa.array` would import pandas for it."""
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _schema(dtype: np.dtype[Any], metadata: Mapping[str, str], *, with_targets: bool) -> Any:
    item = pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)
    fields = [
        pa.field("tokens", pa.large_list(item), nullable=False),
        pa.field("src", pa.uint32(), nullable=False),
        pa.field("row", pa.uint64(), nullable=False),
    ]
    if with_targets:
        bit = pa.field("item", pa.bool_(), nullable=False)
        fields.append(pa.field("targets", pa.large_list(bit), nullable=False))
    return pa.schema(fields, metadata=dict(metadata))


def _target_lists(targets: NDArray[np.bool_], offsets: NDArray[np.int64], kind: Any) -> Any:
    """The column of targets: the documents' own offsets on one bit per token."""
    bits = np.packbits(targets, bitorder="little")
    values = pa.Array.from_buffers(pa.bool_(), len(targets), [None, pa.py_buffer(bits)])
    return pa.LargeListArray.from_arrays(_view(offsets), values, type=kind)


def _read_targets(batch: Any) -> NDArray[np.bool_] | None:
    """Which tokens are targets; None when the shard does not say."""
    if len(batch.schema.names) < len(COLUMNS) + 1:
        return None
    lists = batch.column("targets")
    if not lists.offsets.equals(batch.column("tokens").offsets):
        raise ValueError("targets are not as long as tokens")
    targets: NDArray[np.bool_] = lists.values.to_numpy(zero_copy_only=False)
    return targets


def _single_batch(mapped: Any) -> tuple[Any, Any]:
    reader = pa.ipc.open_file(mapped)
    names = reader.schema.names
    if reader.num_record_batches != 1 or names not in (COLUMNS, [*COLUMNS, "targets"]):
        raise ValueError(
            f"{reader.num_record_batches} record batches with columns {names}, "
            "not one with tokens, src, row"
        )
    return reader.get_batch(0), reader.schema


def _describe(path: Path) -> ShardFile:
    """Read a written file back through a mapping: buffer addresses become file offsets."""
    with pa.memory_map(os.fspath(path)) as mapped:
        size = mapped.size()
        whole = mapped.read_buffer(size)
        batch, _ = _single_batch(mapped)
        documents = batch.column("tokens")
        # Flattened, the buffers are: list validity, list offsets, value validity, values.
        list_validity, offsets, value_validity, values = documents.buffers()
        assert list_validity is None, "tokens has a validity bitmap"
        assert value_validity is None, "token values have a validity bitmap"
        # Arrow pads buffers; the values end where the last offset says.
        num_tokens = len(documents.values)
        num_bytes = num_tokens * documents.values.type.bit_width // 8
        values_offset = values.address - whole.address if num_tokens else 0
        return ShardFile(
            bytes=size,
            rows=len(documents),
            tokens=num_tokens,
            values_offset=values_offset,
            offsets_offset=offsets.address - whole.address,
            tokens_xxh3_128=xxhash.xxh3_128_hexdigest(
                memoryview(whole)[values_offset : values_offset + num_bytes]
            ),
            file_xxh3_128=xxhash.xxh3_128_hexdigest(memoryview(whole)),
            targets=_describe_targets(batch, whole),
        )


def _describe_targets(batch: Any, whole: Any) -> TargetsColumn | None:
    """Where the column of targets is in a mapped file; None when there is none."""
    targets = _read_targets(batch)
    if targets is None:
        return None
    list_validity, _, value_validity, bits = batch.column("targets").buffers()
    assert list_validity is None, "targets has a validity bitmap"
    assert value_validity is None, "target values have a validity bitmap"
    offset = bits.address - whole.address if len(targets) else 0
    held = memoryview(whole)[offset : offset + -(-len(targets) // 8)]
    return TargetsColumn(int(targets.sum()), offset, xxhash.xxh3_128_hexdigest(held))
