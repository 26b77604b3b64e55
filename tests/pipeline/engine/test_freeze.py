"""train.freeze=trunk: heads 2 .. n learn on a model that stays as it is, to the bit."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.hugging_face.loading import load_export
from model.structure.freezing import is_trained
from pipeline.distributed.rendezvous import rank_info
from pipeline.distributed.topology import Topology
from pipeline.engine.build import build_engine
from pipeline.export import main as export_main
from tests.support.engine_cases import Case, engine_config, local_batches
from tests.support.engine_probes import parameters
from tests.support.harness import run_ranks
from tests.support.long_forms import part_of
from tests.support.tiny_llama import fitting_config, imported_model, save_llama
from tests.support.training_runs import metrics_without_times, run_job

SIZES = [
    "model.layers=6",
    "model.ffn_hidden_size=48",
    "model.rope_theta=500",
    "model.norm_eps=2e-5",
]
LAYOUTS = [
    (1, 1, 0),
    (2, 2, 2),
    pytest.param((2, 1, 3), marks=pytest.mark.stress),
]  # ranks, tensor parallel, ZeRO


def _steps(case: Case) -> tuple[dict[str, bool], dict[str, int]]:
    """Which parameters two steps have moved, and how many of Adam's numbers belong to each size."""
    topology = Topology(rank_info(os.environ), case.tensor, torch.device("cpu"))
    engine = build_engine(engine_config(case), topology, "fp32")
    before = {name: part.clone() for name, part in parameters(engine)}
    for step in range(2):
        batches = local_batches(step, case, topology.data_rank)
        assert engine.train_step(batches, learning_rate=1e-2).applied
    moved = {name: not torch.equal(part, before[name]) for name, part in parameters(engine)}
    optimizer = engine._engine.optimizer
    state = getattr(optimizer, "optimizer", optimizer).state
    sizes = {
        "remembered": sum(
            value.numel() for entry in state.values() for value in entry.values() if value.dim()
        ),
        "trained": sum(part.numel() for name, part in before.items() if is_trained(name, "trunk")),
    }
    return moved, sizes


@pytest.mark.parametrize("zero", part_of((0, 1, 3), lambda _, zero: zero > 0))
def test_the_optimizer_knows_the_trained_heads_only(zero: int) -> None:
    """Frozen parameters do not move, decay included, and Adam's two moments are of the others."""
    ranks = run_ranks(2, _steps, Case(world=2, zero=zero, freeze="trunk"))
    moved, sizes = ranks[0]
    assert moved == {name: is_trained(name, "trunk") for name in moved}
    share = 2 if zero else 1
    remembered = sizes["remembered"] * share
    assert 2 * sizes["trained"] <= remembered < 2 * sizes["trained"] + 200  # padding of shares


def _arguments(config: Path, llama: Path, layout: tuple[int, int, int], run: Path) -> list[str]:
    _, tensor, zero = layout
    return [
        *(str(config), "--set", *SIZES, f"train.init_from={llama}", "train.freeze=trunk"),
        *(f"parallel.tensor={tensor}", f"parallel.zero={zero}", f"run.dir={run}"),
        *("eval.every_steps=2", "train.steps=6", "optimizer.learning_rate=1e-2"),
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_comes_out_says_next_what_went_in(
    layout: tuple[int, int, int], config: Path, tmp_path: Path
) -> None:
    """Stopped and resumed as if not; the exported Llama is the imported one, its heads learned."""
    save_llama(tmp_path / "llama")
    runs = [tmp_path / "straight", tmp_path / "resumed"]
    straight, resumed = (_arguments(config, tmp_path / "llama", layout, run) for run in runs)
    done = run_job(tmp_path, straight, world=layout[0])
    assert set(done.codes) == {0}, done.output
    assert "only heads 2 to 3 are trained" in done.output[0]
    assert set(run_job(tmp_path, [*resumed, "train.stop_at_step=3"], world=layout[0]).codes) == {0}
    assert set(run_job(tmp_path, resumed, world=layout[0]).codes) == {0}
    records = metrics_without_times(runs[0])
    assert records == metrics_without_times(runs[1])
    assert len({record["eval_loss_head_1"] for record in records if "eval_loss" in record}) == 1
    assert records[-1]["eval_loss_head_2"] < records[1]["eval_loss_head_2"]

    exported: list[dict[str, Tensor]] = []
    for run in runs:
        assert export_main([str(run), str(run / "export")]) == 0
        exported.append(dict(load_export(run / "export").model.named_parameters()))
    before = load_file(tmp_path / "llama" / "model.safetensors")
    after = load_file(runs[0] / "export" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    fitting = fitting_config(tmp_path / "llama", 3)
    for name, parameter in imported_model(tmp_path / "llama", fitting).named_parameters():
        assert torch.equal(exported[0][name], exported[1][name]), name
        assert torch.equal(exported[0][name], parameter) != is_trained(name, "trunk"), name


def test_freezing_cannot_be_switched_on_resume(config: Path, tmp_path: Path) -> None:
    """The optimizer's states would not fit; the error says to export and begin anew."""
    save_llama(tmp_path / "llama")
    arguments: list[Any] = _arguments(config, tmp_path / "llama", (1, 1, 1), tmp_path / "run")
    assert run_job(tmp_path, [*arguments, "train.stop_at_step=1"]).codes == [0]
    shutil.rmtree(tmp_path / "llama")
    outcome = run_job(tmp_path, [*arguments, "train.freeze=none"])
    assert outcome.codes == [2]
    assert "train.freeze: saved with trunk, this run has none" in outcome.errors[0]
    assert "train.init_from" in outcome.errors[0]
