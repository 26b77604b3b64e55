"""report.html: complete, self-contained, and honest about what was measured."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.errors import ConfigError
from pipeline.checkpoint.file_names import RESOLVED_CONFIG_NAME
from pipeline.report import write_report
from pipeline.reporting.final_figures import final_figures
from pipeline.reporting.metrics import METRICS_NAME, MetricsLog, read_metrics

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
