"""Export: the weights of every layout, a folder equal to them, or an error and no folder."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pipeline.exporting.exporter
import pipeline.exporting.writing
from data_prep.loading.loader import Batch
from data_prep.tokenization.tokenizer import bytes_tokenizer
from foundation.command_line import EXIT_USER_ERROR
from foundation.durable_files import read_entry
from model.config import ModelConfig
from model.errors import CheckpointError
from model.hugging_face.folder import ExportDescription
from model.hugging_face.loading import load_export
from model.structure.sharding import merge_slices, placement_of
from pipeline.checkpoint.file_names import WEIGHTS
from pipeline.checkpoint.files import write_manifest
from pipeline.checkpoint.folder import CheckpointFolder, read_config
from pipeline.checkpoint.saving import Saver
from pipeline.checkpoint.sharded_tensors import read_weights
from pipeline.checkpoint.train_state import Layout, TrainState
from pipeline.config.run_config import RunConfig
from pipeline.distributed.rendezvous import rank_info
from pipeline.distributed.topology import Topology
from pipeline.engine.build import build_engine
from pipeline.export import export, main
from pipeline.exporting.whole_model import compare
from tests.support.engine_probes import parameters
from tests.support.harness import run_ranks
from tests.support.long_forms import part_of

HEADS, SEQUENCE = 3, 16


@dataclass(frozen=True)
class Case:
    """A layout that checkpoints come from."""

    world: int
    tensor: int
    zero: int
    precision: str
    freeze: str = "none"


CASES = [
    Case(world=1, tensor=1, zero=0, precision="fp32"),
    Case(world=2, tensor=2, zero=0, precision="bf16"),
    Case(world=3, tensor=1, zero=1, precision="bf16"),
    Case(world=4, tensor=2, zero=2, precision="fp32"),
    Case(world=3, tensor=1, zero=3, precision="fp32"),
    Case(world=4, tensor=2, zero=3, precision="bf16"),
    Case(world=2, tensor=2, zero=0, precision="bf16", freeze="trunk"),
    Case(world=2, tensor=1, zero=1, precision="bf16", freeze="trunk"),
    Case(world=3, tensor=1, zero=3, precision="bf16", freeze="trunk"),
    Case(world=1, tensor=1, zero=3, precision="fp32", freeze="trunk"),
]


def _name(case: Case) -> str:
    frozen = "" if case.freeze == "none" else "-frozen"
    return f"world{case.world}-tp{case.tensor}-zero{case.zero}-{case.precision}{frozen}"


def _config(case: Case, run_dir: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "tiny", "dir": run_dir, "seed": 3},
            "model": {
                "layers": 5,
                "hidden_size": 32,  # not divisible by 3 ranks, so that ZeRO pads
                "attention_heads": 4,
                "kv_heads": 2,
                "ffn_hidden_size": 50,
                "vocab_size": 258,
                "future_tokens": HEADS,
            },
            "data": {"shards": "none", "sequence_length": SEQUENCE},
            "parallel": {"tensor": case.tensor, "zero": case.zero},
            "batch": {"micro_size": 2},
            "train": {
                "steps": 4,
                "precision": case.precision,
                "device": "cpu",
                "freeze": case.freeze,
                "init_from": None if case.freeze == "none" else "unused",
            },
            "optimizer": {"learning_rate": 1e-2},
            "schedule": {"warmup_steps": 1},
        }
    )


def _train_and_save(case: Case, run_dir: Path) -> dict[str, Tensor]:
    """Two steps, a committed checkpoint, and the whole weights as the run itself has them."""
    config = _config(case, run_dir)
    topology = Topology(rank_info(os.environ), case.tensor, torch.device("cpu"))
    engine = build_engine(config, topology, "bf16" if case.precision == "bf16" else "fp32")
    generator = torch.Generator().manual_seed(topology.data_rank)
    for _ in range(2):
        window = torch.randint(258, (2, SEQUENCE + HEADS), generator=generator)
        labels = torch.stack([window[:, k : k + SEQUENCE] for k in range(1, HEADS + 1)])
        engine.train_step([Batch(window[:, :SEQUENCE], labels)], 1e-2)
    tokenizer = run_dir / "tokenizer.json"
    if topology.is_main:
        tokenizer.write_bytes(bytes_tokenizer())
    layout = Layout(
        world_size=case.world,
        data=case.world // case.tensor,
        tensor=case.tensor,
        stages=1,
        zero=case.zero,
        precision=case.precision,
    )
    state = TrainState(
        step=2, data_fingerprint="", data_seed=3, sequence_length=SEQUENCE, layout=layout
    )
    saver = Saver(
        CheckpointFolder(run_dir, config.checkpoint), config, torch.device("cpu"), tokenizer, 0
    )
    saver.begin(state, engine.snapshot, asynchronous=False)
    saver.finish()
    return {name: _whole(name, part, topology) for name, part in parameters(engine)}


def _whole(name: str, part: Tensor, topology: Topology) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(topology.tensor_size)]
    group = topology.get_tensor_model_parallel_group()
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return merge_slices(parts, placement_of(name)).clone()


@dataclass(frozen=True)
class Trained:
    """A run with one checkpoint."""

    case: Case
    run_dir: Path
    weights: dict[str, Tensor]

    @property
    def checkpoint(self) -> Path:
        """Its checkpoint."""
        return self.run_dir / "checkpoints" / "step_00000002"


def _trained(case: Case, run_dir: Path) -> Trained:
    run_dir.mkdir(parents=True)
    return Trained(case, run_dir, run_ranks(case.world, _train_and_save, case, run_dir)[0])


# One of each ZeRO level, of each type, with and without tensor parallelism and a frozen trunk.
@pytest.fixture(
    scope="module", params=part_of(CASES, lambda number, _: number in (0, 1, 3, 7, 8)), ids=_name
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of each layout."""
    return _trained(request.param, tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of two data-parallel ranks."""
    case = Case(world=2, tensor=1, zero=2, precision="fp32")
    return _trained(case, tmp_path_factory.mktemp("export") / "run")


@pytest.fixture
def broken(small: Trained, tmp_path: Path) -> Path:
    """A checkpoint of the test's own, to damage."""
    return Path(shutil.copytree(small.checkpoint, tmp_path / "step_00000002"))


def test_weights_are_those_of_the_run(trained: Trained) -> None:
    """Read from the files, every parameter is the run's, bit by bit; in bf16 before rounding."""
    config = read_config(trained.checkpoint).model
    weights = dict(read_weights(trained.checkpoint / WEIGHTS, config))
    assert weights.keys() == trained.weights.keys()
    for name, expected in trained.weights.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name].to(expected.dtype), expected), name
    head = weights["heads.layers.3.block.mlp.linear_fc2.weight"]
    assert not torch.equal(head, head.bfloat16().float())


def test_export_holds_the_weights_of_any_layout(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, given the run's folder, writes the run's weights and reports the comparison."""
    assert main([str(trained.run_dir), str(tmp_path / "export")]) == 0
    out = capsys.readouterr().out
    assert f"exported {trained.checkpoint} (step 2)" in out
    assert "reloaded 0, 0, 0" in out
    loaded = load_export(tmp_path / "export")
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype == trained.weights[name].dtype
        assert torch.equal(parameter, trained.weights[name]), name
    assert loaded.record.description == ExportDescription(
        model=read_config(trained.checkpoint).model,
        dtype="bf16" if trained.case.precision == "bf16" else "fp32",
        sequence_length=SEQUENCE,
        eos_token="<|endoftext|>",
        eos_id=256,
        run="tiny",
        step=2,
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_written_type_can_be_chosen(small: Trained, tmp_path: Path, dtype: str) -> None:
    """Logits agree to rounding in either type, and exactly for our own model."""
    lines: list[str] = []
    layered, parity = export(
        small.checkpoint, tmp_path / "export", dtype=dtype, report=lines.append
    )
    assert load_export(tmp_path / "export").record.description.dtype == dtype
    assert len(parity.reloaded) == HEADS
    assert max(parity.reloaded) == 0
    assert parity.transformers < 1e-5 < parity.largest_logit
    assert len(layered.all_heads) == HEADS
    assert max(layered.all_heads) < 1e-5 < layered.largest_logit
    assert [line.partition(":")[0] for line in lines[2:4]] == ["layer by layer", "whole models"]
    assert lines[4].startswith(
        "agreement of the heads is not measured, so --heads auto takes all: "
    )


def test_a_large_model_is_compared_layer_by_layer_only(
    small: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the limit no whole model is built; wrong settings are refused all the same."""
    monkeypatch.setattr(pipeline.exporting.exporter, "WHOLE_MODEL_BYTES", 100_000)
    lines: list[str] = []
    (parity,) = export(small.checkpoint, tmp_path / "export", report=lines.append)
    assert parity.way == "layer by layer"
    assert "layer by layer: largest difference" in lines[2]
    assert "whole models" not in "".join(lines)
    settings = pipeline.exporting.writing.hf_config

    def wrong(description: ExportDescription) -> dict[str, Any]:
        other = description.model.model_copy(update={"norm_eps": 0.5})
        return settings(description.model_copy(update={"model": other}))

    monkeypatch.setattr(pipeline.exporting.writing, "hf_config", wrong)
    with pytest.raises(CheckpointError, match=r"not exported: .* layer by layer: largest"):
        export(small.checkpoint, tmp_path / "other", report=lines.append)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_wrong_export_is_told_apart(small: Trained, tmp_path: Path) -> None:
    """The comparison fails for a changed head 1 in transformers, for any changed head in ours."""
    export(small.checkpoint, tmp_path / "export", report=lambda _: None)
    description = load_export(tmp_path / "export").record.description
    for head in (1, 3):
        name = f"heads.layers.{head}.block.self_attention.linear_qkv.weight"
        changed = small.weights | {name: small.weights[name].roll(1, 0)}
        found = compare(tmp_path / "export", description, iter(changed.items()))
        assert not found.holds
        limit = 1e-4 * found.largest_logit
        assert [difference > limit for difference in found.reloaded] == [
            k == head for k in (1, 2, 3)
        ]
        assert (found.transformers > limit) == (head == 1)
    broken = small.weights | {name: small.weights[name] * float("nan")}
    assert not compare(tmp_path / "export", description, iter(broken.items())).holds


def _recommit(checkpoint: Path) -> None:
    """List the files anew, so that only their content can show that something is missing."""
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != "manifest.json"]
    write_manifest(
        checkpoint, {str(path.relative_to(checkpoint)): read_entry(path) for path in files}
    )


def _fails(checkpoint: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Export must fail in one line and leave nothing; gives the line."""
    before = sorted(target.parent.iterdir())
    assert main([str(checkpoint), str(target)]) == EXIT_USER_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert sorted(target.parent.iterdir()) == before
    return captured.err


def test_damaged_checkpoints_are_refused(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A changed, then a missing file of the checkpoint is named and nothing is written."""
    path = broken / WEIGHTS / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    line = _fails(broken, tmp_path / "export", capsys)
    assert "rank_00000.safetensors differs from its checksum" in line
    path.unlink()
    assert "rank_00000.safetensors is missing" in _fails(broken, tmp_path / "export", capsys)


def test_incomplete_files_are_refused(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a rank's file is left out, the parameter is named; an unreadable file is named."""
    files = broken / WEIGHTS
    second = files / "rank_00001.safetensors"
    content = second.read_bytes()
    second.unlink()
    _recommit(broken)
    assert "weight of parameter" in _fails(broken, tmp_path / "export", capsys)
    second.write_bytes(content[:1000])
    _recommit(broken)
    assert f"{second} cannot be read" in _fails(broken, tmp_path / "export", capsys)
    shutil.rmtree(files)
    files.mkdir()
    _recommit(broken)
    assert "has no rank_*.safetensors" in _fails(broken, tmp_path / "export", capsys)


def test_weights_of_another_model_are_refused(small: Trained) -> None:
    """More layers, or other sizes, than the files hold: the first parameter is named."""
    config = read_config(small.checkpoint).model
    files = small.checkpoint / WEIGHTS
    for change, words in (
        ({"layers": 6}, r"parameter trunk\.layers\.2\..* is missing, and 5 more"),
        ({"layers": 4}, r"parameter trunk\.layers\.1\..* is not one of this model's"),
        ({"vocab_size": 260}, r"embedding\.weight .*only up to element 8,256 of 8,320"),
        ({"vocab_size": 256}, r"holds 8,256 elements of the .* of parameter .* give 8,192"),
    ):
        other = ModelConfig.model_validate(config.model_dump() | change)
        with pytest.raises(CheckpointError, match=words):
            list(read_weights(files, other))


def test_things_that_are_no_checkpoint_are_refused(
    small: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder without checkpoints and a target that is no export are refused."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "is not a checkpoint" in _fails(tmp_path / "mine", tmp_path / "export", capsys)
    assert "is not an earlier export" in _fails(small.checkpoint, tmp_path / "mine", capsys)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_tokenizer_without_end_of_text_is_refused(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end-of-document token is found by its usual names, or must be named."""
    text = bytes_tokenizer().decode().replace("<|endoftext|>", "<done>")
    (broken / "tokenizer.json").write_text(text)
    _recommit(broken)
    assert "--eos-token" in _fails(broken, tmp_path / "export", capsys)
    assert main([str(broken), str(tmp_path / "export"), "--eos-token", "<done>"]) == 0
    assert load_export(tmp_path / "export").record.description.eos_token == "<done>"
