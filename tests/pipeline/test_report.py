"""report.html: complete, self-contained, and honest about what was measured."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.errors import ConfigError
from pipeline.checkpoint.file_names import RESOLVED_CONFIG_NAME
from pipeline.report import main, write_report
from pipeline.reporting.final_figures import final_figures
from pipeline.reporting.metrics import METRICS_NAME, MetricsLog, read_metrics
from pipeline.reporting.run_events import run_events
from pipeline.reporting.run_log import rank_log
from tests.support.training_runs import run_job

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps with 2 heads, validated every 10, one step skipped."""
    folder = tmp_path_factory.mktemp("runs") / "a <run>"
    log = MetricsLog(folder, resumed_step=0)
    for step in range(1, 21):
        record: dict[str, float | bool | None] = {
            "step": step,
            "tokens": step * 100,
            "loss": 5 - step / 10,
            "loss_head_1": 5 - step / 10,
            "loss_head_2": 6 - step / 10 if step != 7 else float("nan"),
            "grad_norm": 1.0,
            "learning_rate": 1e-3,
            "tokens_per_s": 1000.0 + step,
            "step_time_s": 0.5,
            "memory_peak_gib": step / 100,
        }
        if step == 7:
            record["skipped"] = True
        if step % 10 == 0:
            record |= {"eval_loss_head_1": 4.5 - step / 20, "eval_tokens_per_forward": 1.25}
        log.write(record)
    log.close()
    (folder / RESOLVED_CONFIG_NAME).write_text("run:\n  name: <script>\n")
    return folder


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    """The report of that run."""
    return write_report(run_dir).read_text()


def test_report_shows_every_plot_and_the_configuration(page: str) -> None:
    """Six plots as inline SVG with readable text, the configuration escaped."""
    assert page.count("<svg") == page.count("</svg>") == 6
    for title in ("Loss per head", "Learning rate", "Gradient norm", "Throughput", "Peak memory"):
        assert f">{title}</text>" in page
    for label in ("head 1", "head 2", "head 1, held out"):
        assert f">{label}</text>" in page
    assert "head 2, held out" not in page
    assert "name: &lt;script&gt;" in page
    assert "<script" not in page
    assert "a &lt;run&gt;" in page


def test_a_mixture_has_a_plot_of_its_sources(tmp_path: Path) -> None:
    """How often the run went through each source, when there are several."""
    log = MetricsLog(tmp_path / "mixed", resumed_step=0)
    for step in (1, 2):
        sources: dict[str, float | bool | None] = {"epochs_web": step / 9, "epochs_code": step / 3}
        log.write({"step": step, "loss_head_1": 1.0, **sources})
    log.close()
    page = write_report(tmp_path / "mixed").read_text()
    for text in ("Epochs of each source", "web", "code"):
        assert f">{text}</text>" in page


def test_report_needs_nothing_else(run_dir: Path, page: str) -> None:
    """No element loads a file or an address; ids used within the plots do not collide."""
    assert not re.search(r"<(img|link|iframe|script|object)\b", page)
    assert not re.search(r"(src|xlink:href|href)=\"(?!#)", page)
    clip_paths = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(clip_paths) == len(set(clip_paths)) == 6
    assert [path.name for path in run_dir.iterdir() if path.suffix == ".tmp"] == []


def test_report_is_the_same_for_the_same_metrics(run_dir: Path, page: str) -> None:
    """Writing it twice gives equal files."""
    assert write_report(run_dir).read_text() == page


def test_final_figures_are_those_of_the_records(run_dir: Path) -> None:
    """Last and first losses, the median speed, the highest memory, the steps skipped."""
    figures = dict(final_figures(read_metrics(run_dir), num_heads=2))
    assert figures["Steps"] == "20"
    assert figures["Tokens trained on"] == "2,000"
    assert figures["Training loss, head 1"] == "3.0000 (first 4.9000)"
    assert figures["Held-out loss, head 1"] == "3.5000 (first 4.0000)"
    assert figures["Tokens per second, median"] == "1,010"
    assert figures["Peak memory"] == "0.20 GiB"
    assert figures["Time in reported steps"] == "0:00:10"
    assert figures["Skipped steps"] == "1"
    assert "Held-out loss, head 2" not in figures


def test_plots_without_data_are_left_out(tmp_path: Path) -> None:
    """A run that was never validated has no empty plots."""
    log = MetricsLog(tmp_path, resumed_step=0)
    log.write({"step": 1, "loss": 2.0, "loss_head_1": 2.0})
    log.close()
    assert write_report(tmp_path).read_text().count("<svg") == 1


def test_figures_without_an_axis_are_not_drawn(tmp_path: Path) -> None:
    """The report of a run that diverged as far as numbers go is written all the same."""
    log = MetricsLog(tmp_path, resumed_step=0)
    for step, value in ((0, 1e308), (1, -1e308), (2, 1.0)):
        log.write({"step": step, "loss_head_1": value, "grad_norm": 1e308})
    log.close()
    assert write_report(tmp_path).read_text().count("<svg") == 2


def test_a_run_without_metrics_is_refused(tmp_path: Path) -> None:
    """No file, or no record in it yet, is said in one line."""
    with pytest.raises(ConfigError, match="does not exist"):
        write_report(tmp_path)
    (tmp_path / METRICS_NAME).write_text("")
    with pytest.raises(ConfigError, match="no metrics yet"):
        write_report(tmp_path)


def test_command_line(run_dir: Path, tmp_path: Path) -> None:
    """It prints where the report is; a wrong folder gives one line and a non-zero exit code."""
    command = [sys.executable, "-m", "pipeline.report"]
    good = subprocess.run([*command, str(run_dir)], cwd=ROOT, capture_output=True, text=True)
    assert (good.returncode, good.stdout.strip()) == (0, str(run_dir / "report.html"))
    bad = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1


def _logged(folder: Path, steps: int, *lines: str) -> Path:
    """A run of so many steps and one that was left out, whose rank 0 has logged these lines."""
    log = MetricsLog(folder, resumed_step=0)
    for step in range(1, steps + 1):
        log.write({"step": step, "loss_head_1": 5 - step / 10, "tokens_per_s": 100.0})
    log.write({"step": steps + 1, "loss_head_1": 3.0, "skipped": 1, "rollbacks": 1})
    log.close()
    path = rank_log(folder, 0)
    path.parent.mkdir()
    path.write_text("".join(f"2026-01-01 00:00:00 INFO {line}\n" for line in lines))
    return folder


LINES = (
    *("layout        2 ranks = 2 data", "new run: step 0, tokens 0, next sample 0"),
    "saved /r/checkpoints/step_00000002 in 0.1 s; training waited 0.0 s",
    *("layout        2 ranks = 2 data", "resumed from /r: step 2, tokens 9, next sample 9"),
    *("layout        4 ranks = 4 data", "resumed from /r: step 4, tokens 9, next sample 9"),
)


def test_what_happened_is_known_by_step(tmp_path: Path) -> None:
    """Resumes, another layout and saves from the log; skips and rollbacks from the metrics."""
    run = _logged(tmp_path / "a", 5, *LINES)
    found = {(event.kind, event.step) for event in run_events(run, read_metrics(run))}
    assert found == {
        *(("resume", 2), ("resume", 4), ("layout", 4), ("save", 2)),
        *(("skip", 6), ("rollback", 6)),
    }


def test_what_happened_is_marked_on_the_curves(tmp_path: Path) -> None:
    """With a legend; a run without a log has its metrics' marks."""
    page = write_report(_logged(tmp_path / "a", 5, *LINES)).read_text()
    for label in ("resumed", "resumed in another layout", "rolled back", "step skipped", "saved"):
        assert f">{label}</text>" in page
    quiet = write_report(_logged(tmp_path / "b", 5)).read_text()
    assert ">rolled back</text>" in quiet
    assert ">resumed</text>" not in quiet


def test_runs_are_compared_on_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A curve per run with its name, the final figures side by side, what happened counted."""
    runs = [_logged(tmp_path / "first", 5, *LINES), _logged(tmp_path / "second", 9)]
    assert main([str(run) for run in runs]) == 0
    path = tmp_path / "comparison.html"
    assert capsys.readouterr().out.strip() == str(path)
    page = path.read_text()
    for text in ("first", "second", "Loss of first", "Loss of second", "Loss, head 1"):
        assert f">{text}</text>" in page
    assert re.search(r"<td>Steps</td><td>6</td><td>10</td>", page)
    assert re.search(r"<td>resumes</td><td>2</td><td>0</td>", page)
    assert main([str(runs[0]), str(tmp_path)]) == 1


def test_an_index_has_a_row_for_each_run(tmp_path: Path) -> None:
    """Its status from the verdict or the lease, its last figures, and a link that works."""
    done = _logged(tmp_path / "a <b>", 5)
    write_report(done)
    (done / "verdict.json").write_text('{"outcome": "lost"}')
    held = _logged(tmp_path / "held", 5)
    (held / "lease.json").touch()
    _logged(tmp_path / "other", 5)
    assert main(["--index", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    rows = dict(re.findall(r'<tr><td><a href="([^"]+)">.*?</a></td><td>(\w+)</td>', page))
    assert rows == {
        "./a%20%3Cb%3E/report.html": "lost",
        "./held/metrics.jsonl": "running",
        "./other/metrics.jsonl": "unknown",
    }
    assert "<td>6</td><td>3.0000</td><td>-</td><td>100</td>" in page
    (tmp_path / "empty").mkdir()
    assert main(["--index", str(tmp_path / "empty")]) == 1


def test_the_log_that_marks_come_from_is_the_one_that_runs_write(
    config: Path, tmp_path: Path
) -> None:
    """A real run, stopped and resumed: the words that are looked for are those that are written."""
    for stop in (6, 9):
        settings = ["--set", f"train.stop_at_step={stop}", "eval.every_steps=0"]
        assert run_job(tmp_path, [str(config), *settings]).codes == [0]
    run = tmp_path / "run"
    found = [(event.kind, event.step) for event in run_events(run, read_metrics(run))]
    assert found == [("save", 3), ("resume", 6), ("save", 6), ("save", 9)]
