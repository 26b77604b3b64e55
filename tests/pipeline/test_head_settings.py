"""Kinds of heads and weights that change by the step, through whole commands."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.generate import main as generate
from pipeline.export import main as export
from tests.support.head_variants import VARIANTS
from tests.support.training_runs import metrics_without_times, run_job

ROOT = Path(__file__).parents[2]
# Adam's eps is far above the rounding of gradients, which it would enlarge otherwise.
COMMON = ["train.steps=6", "eval.every_steps=3", "optimizer.eps=1e-4"]
FALLING = "[{trunk: 0-1}, {heads: 2-3}, {heads: 1}]"
RISING = "[{trunk: 0-1}, {heads: 1}, {heads: 2-3}]"
TOGETHER = "[{trunk: 0}, {trunk: 1}, {heads: 1-3}]"


def settings_of(variant: str) -> list[str]:
    """Two trunk layers and three heads."""
    keys = VARIANTS[variant]
    each = 0 if keys.get("head_kind") == "linear" else keys.get("head_layers", 1)
    return [f"model.layers={2 + 3 * each}", *(f"model.{k}={v}" for k, v in keys.items())]


def stages_of(variant: str) -> str:
    """Three stages."""
    kind = str(VARIANTS[variant].get("head_kind"))
    return {"anticausal": FALLING, "linear": TOGETHER}.get(kind, RISING)


def train(folder: Path, config: Path, settings: list[str], world: int = 1) -> list[dict[str, Any]]:
    """Run the command; the records of the run."""
    outcome = run_job(folder, [str(config), "--set", *COMMON, *settings], world=world)
    assert set(outcome.codes) == {0}, outcome.output
    run = next((s.partition("=")[2] for s in settings if s.startswith("run.dir=")), folder / "run")
    return metrics_without_times(Path(run))


KINDS = [v for v in VARIANTS if v != "parallel"]
FAST = ("anticausal",)


@pytest.mark.parametrize(
    "variant",
    [v if v in FAST else pytest.param(v, marks=pytest.mark.stress) for v in KINDS],
)
def test_a_run_of_any_kind_goes_on_elsewhere_and_is_exported(
    config: Path, tmp_path: Path, variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stages, then two data-parallel ranks: the figures of one process that never stopped.

    Then its export generates with all heads what it generates with one.
    """
    chosen = settings_of(variant)
    whole = train(tmp_path, config, [*chosen, f"run.dir={tmp_path / 'whole'}", "parallel.zero=0"])
    halves = [
        ["train.stop_at_step=3", f"parallel.stages={stages_of(variant)}", "parallel.zero=1"],
        ["batch.micro_size=2", "parallel.zero=3"],
    ]
    train(tmp_path, config, [*chosen, *halves[0]], world=3)
    resumed = train(tmp_path, config, [*chosen, *halves[1]], world=2)
    assert [record["step"] for record in resumed] == [record["step"] for record in whole]
    for found, expected in zip(resumed, whole, strict=True):
        for key in expected:
            if key.startswith(("loss", "eval_loss", "grad_norm")):
                assert found[key] == pytest.approx(expected[key], rel=1e-5), key
    assert export([str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    told = json.loads((tmp_path / "export" / "headway.json").read_text())["description"]["model"]
    assert {key: told[key] for key in VARIANTS[variant]} == VARIANTS[variant]
    capsys.readouterr()
    prompt = ["--prompt", "abc", "--max-new-tokens", "20"]
    assert generate([str(tmp_path / "export"), *prompt, "--compare"]) == 0
    assert "outputs are equal" in capsys.readouterr().out


def test_weights_change_by_the_step(config: Path, tmp_path: Path) -> None:
    """Each step's loss has the weights of its phase, whether or not the run was interrupted."""
    schedule = "model.head_weights=[[0, [1, 0, 0]], [2, [1, 0.5, 0]], [4, [1, 1, 1]]]"
    whole = train(tmp_path, config, [schedule, f"run.dir={tmp_path / 'whole'}"])
    phases: dict[int, list[float]] = {1: [1, 0, 0], 2: [1, 0, 0], 3: [1, 0.5, 0], 4: [1, 0.5, 0]}
    phases |= {5: [1, 1, 1], 6: [1, 1, 1]}
    for record in whole:
        weights = phases[record["step"]]
        assert record["head_weights"] == weights
        losses = [record[f"loss_head_{k}"] for k in (1, 2, 3)]
        wanted = sum(w * loss for w, loss in zip(weights, losses, strict=True))
        assert record["loss"] == pytest.approx(wanted, rel=1e-6)
        if "eval_loss" in record:
            losses = [record[f"eval_loss_head_{k}"] for k in (1, 2, 3)]
            wanted = sum(w * loss for w, loss in zip(weights, losses, strict=True))
            assert record["eval_loss"] == pytest.approx(wanted, rel=1e-6)
    train(tmp_path, config, [schedule, "train.stop_at_step=3"])
    assert train(tmp_path, config, [schedule]) == whole
    # Until its weight is above 0 a head learns nothing: its loss falls later.
    other = train(tmp_path, config, [f"run.dir={tmp_path / 'other'}"])
    assert [r["loss_head_1"] for r in whole[:1]] == [r["loss_head_1"] for r in other[:1]]
    assert [r["loss_head_2"] for r in whole] != [r["loss_head_2"] for r in other]


def test_an_export_has_the_weights_of_its_step(config: Path, tmp_path: Path) -> None:
    """For training on with transformers; the card has the schedule."""
    schedule = "model.head_weights=[[0, [1, 0, 0]], [2, [1, 0.5, 0]], [4, [1, 1, 1]]]"
    train(tmp_path, config, [schedule, "train.stop_at_step=3"])
    assert export([str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    written = json.loads((tmp_path / "export" / "config.json").read_text())
    assert written["head_weights"] == [1, 0.5, 0]
    card = (tmp_path / "export" / "README.md").read_text()
    assert "1, 0, 0; after 2 steps: 1, 0.5, 0; after 4 steps: 1, 1, 1" in card


@pytest.mark.stress
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dry_run_plans_every_kind(config: Path, variant: str) -> None:
    """Parameters, memory and stages, without a run."""
    settings = [*settings_of(variant), f"parallel.stages={stages_of(variant)}"]
    planned = subprocess.run(
        [
            *(sys.executable, "-m", "pipeline.train", str(config), "--dry-run"),
            *("--world-size", "3", "--set", *settings),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert planned.returncode == 0, planned.stderr
    assert yaml.safe_load(config.read_text())["model"]["future_tokens"] == 3
    assert "3 heads" in planned.stdout
