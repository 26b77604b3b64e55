"""Files to units of work."""

from data_prep.inputs.input_files import InputFile
from data_prep.inputs.units import choose_unit_bytes, plan_units


def test_units_depend_on_sizes_alone() -> None:
    """Small files are grouped, large .jsonl and .parquet files cut, all others left whole."""
    files = [
        InputFile("/a.jsonl", "jsonl", 3, 0),
        InputFile("/b.txt", "text", 3, 0),
        InputFile("/c.jsonl", "jsonl", 10, 0),
        InputFile("/d.txt", "text", 10, 0),
        InputFile("/e.txt", "text", 0, 0),
        InputFile("/f.parquet", "parquet", 5, 0),
        InputFile("/g.jsonl.gz", "jsonl", 9, 0),
        InputFile("/h.arrow", "arrow", 9, 0),
    ]
    units = plan_units(files, 4)
    assert [[(s.file, s.start, s.end) for s in unit.segments] for unit in units] == [
        [(0, 0, 3), (1, 0, 3)],
        [(2, 0, 4)],
        [(2, 4, 8)],
        [(2, 8, 10)],
        [(3, 0, 10)],
        [(4, 0, 0)],
        [(5, 0, 4)],
        [(5, 4, 5)],
        [(6, 0, 9)],
        [(7, 0, 9)],
    ]
    assert [unit.number for unit in units] == list(range(10))
    assert choose_unit_bytes(0) == 1 << 20
    assert choose_unit_bytes(1 << 31) == 1 << 25
    assert choose_unit_bytes(1 << 50) == 1 << 26
