"""The training command from outside: layouts, validation, dry runs, the golden curve."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.training_runs import metrics_without_times, run_job

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
GOLDEN = Path(__file__).with_name("golden_curve.json")
# fp32 sums in another order.
TOLERANCE = 1e-5
Layout = tuple[int, int, int, int]  # tensor, data, zero, accumulation
LAYOUTS = [(1, 1, 0, 1), (2, 1, 3, 2), (1, 2, 1, 2)]
MORE_LAYOUTS = [(1, 2, 3, 1), (2, 2, 3, 1), (1, 2, 2, 1)]
GLOBAL_BATCH = 8


def _figures(run_dir: Path) -> list[dict[str, Any]]:
    compared = ("loss_head_", "grad_norm", "eval_loss", "eval_tokens")
    return [
        {k: v for k, v in record.items() if k.startswith(compared)}
        for record in metrics_without_times(run_dir)
    ]


def _train(tmp_path: Path, shards: Path, layout: Layout) -> list[dict[str, Any]]:
    """Five steps of the quickstart's model in one layout, on the tiny shards."""
    tensor, data, zero, accumulation = layout
    run_dir = tmp_path / "-".join(map(str, layout))
    settings = [
        f"run.dir={run_dir}",
        f"data.shards={shards}",
        f"parallel.tensor={tensor}",
        f"parallel.zero={zero}",
        f"batch.micro_size={GLOBAL_BATCH // (data * accumulation)}",
        f"batch.accumulation={accumulation}",
        "train.precision=fp32",
        "train.device=cpu",
        "train.stop_at_step=5",
        "eval.every_steps=5",
        "eval.samples=12",
        "log.tensorboard=false",
    ]
    tmp_path.mkdir(exist_ok=True)
    outcome = run_job(tmp_path, [str(QUICKSTART), "--set", *settings], world=tensor * data)
    assert set(outcome.codes) == {0}, outcome.output
    return _figures(run_dir)


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.stress) for layout in MORE_LAYOUTS)],
    ids=lambda layout: "tp{}-dp{}-zero{}-acc{}".format(*layout),
)
def test_layouts_agree_from_the_command_line(shards: Path, tmp_path: Path, layout: Layout) -> None:
    """Losses, norms and validation of the quickstart's model agree over layouts, and as recorded.

    The recorded curve pins the numerics: data order, initial weights, losses, optimizer. When it
    moves, something of that moved; record a new one (RECORD_GOLDEN=1) only with the reason in the
    commit.
    """
    if os.environ.get("RECORD_GOLDEN"):
        GOLDEN.write_text(json.dumps(_train(tmp_path / "new", shards, LAYOUTS[0]), indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    steps = _train(tmp_path, shards, layout)
    assert len(steps) == 5
    for step, expected in zip(steps, golden, strict=True):
        assert step.keys() == expected.keys()
        for key, value in expected.items():
            # The shares of agreeing predictions are counts: a near-tie may flip one of many.
            tolerance = 2e-3 if key == "eval_tokens_per_forward" else TOLERANCE
            assert step[key] == pytest.approx(value, rel=tolerance), key


def test_validation_does_not_touch_training(config: Path, tmp_path: Path) -> None:
    """With and without validation between the steps, training is bit-identical under ZeRO-3."""
    runs = []
    for every in (0, 1):
        run_dir = tmp_path / f"every_{every}"
        settings = [f"run.dir={run_dir}", f"eval.every_steps={every}", "batch.micro_size=2"]
        settings += ["parallel.zero=3", "train.steps=6"]
        outcome = run_job(tmp_path, [str(config), "--set", *settings], world=2)
        assert outcome.codes == [0, 0], outcome.output
        records = metrics_without_times(run_dir)
        runs.append([{k: v for k, v in r.items() if not k.startswith("eval")} for r in records])
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "zero", [1, 3, *(pytest.param(zero, marks=pytest.mark.stress) for zero in (0, 2))]
)
def test_bf16_on_cpu_follows_fp32(config: Path, tmp_path: Path, zero: int) -> None:
    """bf16 training runs on a CPU at each ZeRO level and stays near the fp32 losses."""
    settings = ["train.precision=fp32", f"run.dir={tmp_path / 'fp32'}"]
    assert run_job(tmp_path, [str(config), "--set", *settings]).codes == [0]
    expected = _figures(tmp_path / "fp32")[-1]
    run_dir = tmp_path / "bf16"
    settings = ["train.precision=bf16", f"parallel.zero={zero}", f"run.dir={run_dir}"]
    settings += ["batch.micro_size=2"]
    outcome = run_job(tmp_path, [str(config), "--set", *settings], world=2)
    assert outcome.codes == [0, 0], outcome.output
    last = _figures(run_dir)[-1]
    for key in ("loss_head_1", "loss_head_2", "loss_head_3", "eval_loss_head_1"):
        assert last[key] == pytest.approx(expected[key], rel=0.02), key  # 8 bits


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_passes_a_dry_run(path: Path, tmp_path: Path) -> None:
    """Every shipped configuration resolves and describes itself, on any machine.

    It does so for the world size that its first lines name.
    """
    named = re.search(r"world size (\d+)", path.read_text())
    assert named is not None, "the comment says for how many ranks it is"
    outcome = run_job(tmp_path, [str(path), "--dry-run", "--world-size", named[1]])
    assert outcome.codes == [0], outcome.output
    words = ("parameters", "layout", "tokens", "FLOPs per token", "zero_optimization")
    for word in (*words, "activations   ", "GiB of logits and gradients"):
        assert word in outcome.output[0]
    for share in re.findall(r"predicted idle ([\d.]+)%", outcome.output[0]):
        assert float(share) < 10, "a shipped plan of stages keeps them busy"
    assert path.read_text().startswith("# For")


def test_metrics_have_the_promised_keys(config: Path, tmp_path: Path) -> None:
    """Each step's line holds what others script against."""
    assert run_job(tmp_path, [str(config)]).codes == [0]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, 13))
    for record in records:
        for key in (
            *("tokens", "loss", "loss_head_1", "loss_head_2", "loss_head_3", "grad_norm"),
            *("learning_rate", "tokens_per_s", "step_time_s", "memory_peak_gib"),
        ):
            assert record[key] > 0, key
    evaluated = [record["step"] for record in records if "eval_loss_head_1" in record]
    assert evaluated == [4, 8, 12]
    assert 1 <= records[-1]["eval_tokens_per_forward"] <= 3
