"""Run folders of any content: `report` and `inspect` show what is there, or end with one error."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from pipeline import commands, report
from pipeline.checkpoint.file_names import FOLDER, RESOLVED_CONFIG_NAME, WEIGHTS
from pipeline.report import REPORT_NAME
from pipeline.reporting.metrics import METRICS_NAME, cut_after
from tests.support.damage import DAMAGES, Damage, damaged_copy
from tests.support.hostile import Ended, call_command, fuzzed, untouched

VERSIONS = Path(__file__).parents[1] / "pipeline" / "checkpoint" / "versions"
KEYS = (
    *("tokens", "loss", "loss_head_1", "loss_head_2", "loss_head_999999999", "loss_head_-1"),
    *("loss_head_" + "9" * 5000, "eval_loss_head_1", "grad_norm", "learning_rate", "tokens_per_s"),
    *("mfu", "step_time_s", "memory_peak_gib", "skipped", "epochs_$x^$", "epochs_", "epochs__a"),
    *(
        "epochs_\x1b[2J",
        "stage_idle",
        "resume_changes",
        "\ud800",
        "x",
        "",
        "eval_tokens_per_forward",
    ),
)
NUMBERS = st.sampled_from(
    (0, 1, -1, 1.5, 1e308, -1e308, 5e-324, 10**400, 1 << 62, 1 << 63, float("nan"), float("inf"))
)
VALUES: st.SearchStrategy[Any] = (
    NUMBERS | st.sampled_from([None, True, "text", {}, [], {"a": [1]}]) | st.lists(NUMBERS)
)
RECORDS = st.fixed_dictionaries(
    {"step": st.integers(1, 50) | NUMBERS}, optional=dict.fromkeys(KEYS, VALUES)
)
PLAIN = st.fixed_dictionaries(
    {"step": st.integers(0, 1 << 62)},
    optional={key: st.sampled_from((None, True, 0, -1, 1e308, -1e308, 5e-324, 3)) for key in KEYS},
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of some steps with a checkpoint; its first report has loaded the plotting library."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(VERSIONS / "manifest_2", run_dir)
    records = [
        {"step": step, "loss_head_1": 3.0 / step, "loss_head_2": 4.0, "grad_norm": 1.0}
        for step in range(1, 6)
    ]
    (run_dir / METRICS_NAME).write_text("".join(json.dumps(one) + "\n" for one in records))
    (run_dir / RESOLVED_CONFIG_NAME).write_text("run: {name: x}\n")
    assert report.main([str(run_dir)]) == 0
    (run_dir / REPORT_NAME).unlink()
    return run_dir


def show(folder: Path) -> list[Ended]:
    """`headway inspect` and `headway report`, which write nothing but the report."""
    ended = []
    for command in ("inspect", "report"):
        with untouched(folder.parent):
            ended.append(call_command(commands.main, [command, str(folder)]))
            if (folder / REPORT_NAME).is_file():
                (folder / REPORT_NAME).unlink()
    return ended


@fuzzed(8, damages=st.lists(DAMAGES, min_size=1, max_size=2))
def test_any_run_folder(run_dir: Path, damages: list[Damage]) -> None:
    """Damage of every kind to every file of a run."""
    with damaged_copy(run_dir, *damages) as copy:
        show(copy)


@fuzzed(40, records=st.lists(RECORDS, min_size=1, max_size=3), end=st.binary(max_size=5))
def test_any_metrics(run_dir: Path, records: list[dict[str, Any]], end: bytes) -> None:
    """Records of any keys and values, of which hardly any is one."""
    report_of(run_dir, records, end)


@fuzzed(6, records=st.lists(PLAIN, min_size=1, max_size=3))
def test_any_figures(run_dir: Path, records: list[dict[str, Any]]) -> None:
    """Records that are ones, with numbers that no run gives."""
    report_of(run_dir, records, b"")


def report_of(run_dir: Path, records: list[dict[str, Any]], end: bytes) -> None:
    """The report of these records; taking out what is past a step must not fail either."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    with damaged_copy(run_dir) as copy:
        (copy / METRICS_NAME).write_bytes(lines.encode() + end)
        show(copy)
        cut_after(copy / METRICS_NAME, 25)


@pytest.mark.filterwarnings("ignore:constrained_layout")
@pytest.mark.parametrize("count", [3, 20_000])
def test_heads_are_those_that_have_losses(run_dir: Path, count: int) -> None:
    """Head 999,999,999 is none, and of thousands the first are drawn."""
    losses = {f"loss_head_{head}": 1.0 for head in [*range(1, count), 999_999_999]}
    with damaged_copy(run_dir) as copy:
        (copy / METRICS_NAME).write_text(json.dumps({"step": 1, **losses}) + "\n")
        assert [ended.code for ended in show(copy)] == [0, 0]


@pytest.mark.parametrize("name", [METRICS_NAME, RESOLVED_CONFIG_NAME, "latest", WEIGHTS, FOLDER])
@pytest.mark.parametrize("kind", ["folder", "file", "pipe", "device", "sparse", "line"])
def test_things_that_are_no_files(run_dir: Path, name: str, kind: str) -> None:
    """A folder where a file should be, and the reverse; pipes, devices, files without an end."""
    with damaged_copy(run_dir) as copy:
        path = next(copy.rglob(name))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.write_bytes(b"" if kind == "file" else b"[" * 10_000_000 + b"\n")
        if kind == "sparse":
            os.truncate(path, 1 << 42)
        show(copy)
