"""`pipeline.plan` from outside: what it says, its exit status, what it needs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.plan import main

ROOT = Path(__file__).resolve().parents[2]
SEVEN = str(ROOT / "configs" / "7b.yaml")


def test_a_run_that_fits_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    """Memory by item, traffic by link, days, and the cost when there is a price."""
    assert main([SEVEN, "--nodes", "8", "--gpu", "h100-80g", "--price", "2"]) == 0
    shown = capsys.readouterr().out
    for item in ("weights", "gradients", "optimizer", "activations", "logits", "bucket", "resume"):
        assert f"{item} " in shown
    assert "between nodes" in shown
    assert "tokens/s" in shown
    assert "at 2 a GPU-hour" in shown
    assert shown.splitlines()[-1].startswith("fits ")


def test_a_run_that_does_not_fit_ends_with_1_and_a_change_that_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The named keys, given to the same command, end it with 0."""
    command = [SEVEN, "--nodes", "1", "--gpu", "a100-40g"]
    assert main(command) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("it fits with  --set ")
    settings = last.split("--set ")[1].split(" (")[0].split()
    assert main([*command, "--set", *settings]) == 0


def test_nodes_are_named_when_no_layout_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """13B on one GPU is a matter of how many."""
    config = str(ROOT / "configs" / "13b.yaml")
    assert main([config, "--world-size", "1", "--gpu", "a100-40g"]) == 1
    assert "no layout of this step fits on 1; on " in capsys.readouterr().out


def test_search_ranks_layouts_with_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    """Fastest first, each with its line."""
    assert main([SEVEN, "--nodes", "1", "--gpu", "h200-141g", "--search"]) == 0
    table = capsys.readouterr().out.split("fastest first\n")[1].splitlines()[1:]
    rates = [float(line.split()[0].replace(",", "")) for line in table[::2]]
    assert rates == sorted(rates, reverse=True)
    assert len(rates) > 3
    assert all("--set " in line or "as it is" in line for line in table[1::2])


def test_json_has_the_same_in_bytes_and_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """Totals are sums of items; the remedy is a plan itself."""
    command = [SEVEN, "--nodes", "1", "--gpu", "a100-40g", "--price", "2", "--json", "--search"]
    assert main(command) == 1
    record = json.loads(capsys.readouterr().out)
    (stage,) = record["memory"]
    items = ("weights", "optimizer", "gradients", "bucket", "activations", "passing", "logits")
    assert stage["computing"] == pytest.approx(sum(stage[k] for k in items) + stage["lm_head"])
    assert record["peak_bytes"] > record["memory_bytes"]
    assert record["fits"] is False
    assert record["cost"] == pytest.approx(2 * record["time"]["gpu_hours"])
    assert record["remedy"]["fits"] is True
    assert record["remedy"]["set"] == {"parallel.zero": 3}
    assert all(found["fits"] for found in record["search"])


@pytest.mark.parametrize("name", ["300m", "1b", "7b", "7b_staged", "13b"])
def test_a_configuration_predicts_what_the_plan_says(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory, speed and days in its comment are the command's, rounded as they are written."""
    path = ROOT / "configs" / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("# ") for line in lines if line.startswith("# "))
    ranks = re.search(r"world size (\d+)", comment)
    said = re.search(
        r"Predicted by pipeline\.plan for H100s, not measured: (\d+) GB on a GPU, ([\d,]+) tokens "
        r"a second and GPU, ([\d.]+) days",
        comment,
    )
    assert ranks is not None
    assert said is not None
    assert main([str(path), "--world-size", ranks[1], "--gpu", "h100-80g", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert round(plan["peak_bytes"] / 1e9) == int(said[1])
    tokens_per_s = plan["time"]["tokens_per_s"] / plan["ranks"]
    assert tokens_per_s == pytest.approx(float(said[2].replace(",", "")), rel=0.02)
    assert round(plan["time"]["days"], 1) == float(said[3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--world-size", "0"], "the plan is for 0 GPUs"),
        (["--nodes", "2", "--gpus-per-node", "0"], "the plan is for 0 GPUs"),
        (["--nodes", "1", "--price", "-1"], "--price=-1 must be above 0"),
        (["--nodes", "1", "--network", "0"], "--network=0 must be above 0"),
        (["--nodes", "1", "--set", "train.device=cpu"], "train.device=cpu, and plans are for GPUs"),
        (["--nodes", "1", "--set", "parallel.tensor=3"], "not divisible"),
        (["--nodes", "1", "--set", "batch.micro=1"], "batch.micro_size"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit status 1."""
    assert main([SEVEN, "--gpu", "a100-40g", *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_the_command_needs_no_torch() -> None:
    """It starts at once, also where torch is not installed."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pipeline.plan import main\n"
        f"sys.exit(main([{SEVEN!r}, '--nodes', '8', '--gpu', 'h100-80g']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
