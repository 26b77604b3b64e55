"""One rank's part of `checkpoint.py`: saves beside real training steps, loads, and the raw disk."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.loading.loader import Batch
from foundation.durable_files import BLOCK_BYTES
from pipeline.checkpoint.file_names import FOLDER, WEIGHTS, step_folder
from pipeline.checkpoint.files import checkpoint_path
from pipeline.checkpoint.folder import CheckpointFolder, verify_together
from pipeline.checkpoint.saving import Saver
from pipeline.checkpoint.train_state import Layout, TrainState
from pipeline.config.run_config import RunConfig
from pipeline.distributed.agreement import RankFlags, agree
from pipeline.distributed.rendezvous import RankInfo
from pipeline.distributed.topology import Topology
from pipeline.engine.build import build_engine

RANKS = 2
SEQUENCE = 64
MIB = 2**20
Figures = dict[str, float]


def run_config(folder: Path, *, quick: bool, tensor: int) -> RunConfig:
    """The model that is saved: 124 million parameters, or a tiny one."""
    hidden, layers, vocabulary = (64, 4, 512) if quick else (768, 10, 32768)
    return RunConfig.model_validate(
        {
            "run": {"name": "checkpoint", "dir": folder / "run"},
            "model": {
                "layers": layers,
                "hidden_size": hidden,
                "attention_heads": hidden // 64 * 2 if quick else hidden // 64,
                "ffn_hidden_size": hidden * 8 // 3 // 64 * 64,
                "vocab_size": vocabulary,
                "future_tokens": 2,
            },
            "data": {"shards": "unused", "sequence_length": SEQUENCE},
            "parallel": {"zero": 1, "tensor": tensor},
            "batch": {"micro_size": 1},
            "train": {"steps": 1000, "precision": "fp32", "device": "cpu"},
            "optimizer": {"learning_rate": 1e-4},
            "schedule": {"warmup_steps": 1},
            "checkpoint": {"every_steps": 10},
        }
    )


class Bench:
    """An engine, and what saves and loads it.

    Args:
        rank: this process.
        folder: on the disk to be measured.
        quick: a tiny model.
        tensor: tensor-parallel size.
    """

    def __init__(self, rank: int, folder: Path, *, quick: bool, tensor: int) -> None:
        config = run_config(folder, quick=quick, tensor=tensor)
        device = torch.device("cpu")
        topology = Topology(RankInfo(rank, rank, RANKS), tensor, device)
        self.parameters = config.model.parameter_count().total
        self.checkpoints = CheckpointFolder(config.run.dir, config.checkpoint)
        self.engine = build_engine(config, topology, "fp32")
        self.state = TrainState(
            data_fingerprint="",
            data_seed=0,
            sequence_length=SEQUENCE,
            layout=Layout(
                world_size=RANKS,
                data=RANKS // tensor,
                tensor=tensor,
                stages=1,
                zero=1,
                precision="fp32",
            ),
        )
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_text("{}")
        self.saver = Saver(self.checkpoints, config, device, tokenizer, 0)
        heads, vocabulary = config.model.future_tokens, config.model.vocab_size
        generator = torch.Generator().manual_seed(topology.data_rank)
        window = torch.randint(vocabulary, (1, SEQUENCE + heads), generator=generator)
        labels = torch.stack([window[:, k : k + SEQUENCE] for k in range(1, heads + 1)])
        self._batch = Batch(window[:, :SEQUENCE], labels)

    def step(self) -> float:
        """One training step; its seconds."""
        started_s = time.perf_counter()
        self.engine.train_step([self._batch], 1e-4)
        self.state.advance(samples=RANKS, applied=True)
        return time.perf_counter() - started_s

    def save(self) -> Figures:
        """A synchronous save."""
        self.saver.begin(self.state, self.engine.snapshot, asynchronous=False)
        self.saver.finish()
        self.saver.close()
        return {"wait_s": _figure(self.saver, "save_stall_s")}

    def save_beside_training(self) -> Figures:
        """An asynchronous save, and the steps that were trained until it was committed."""
        before = self.saver.saved_step
        self.saver.begin(self.state, self.engine.snapshot, asynchronous=True)
        steps = []
        while self.saver.saved_step == before:
            steps.append(self.step())
            flags = RankFlags(save_done=self.saver.is_done)
            self.saver.advance(all_done=agree(torch.tensor(True), flags).save_done)
        figures = self.saver.figures()
        self.saver.close()
        return {
            "wait_s": float(figures["save_stall_s"]),
            "total_s": float(figures["save_total_s"]),
            "step_s": sum(steps) / len(steps),
        }


def _figure(saver: Saver, name: str) -> float:
    return float(saver.figures()[name])


def measure_saves(rank: int, folder: Path, quick: bool, repetitions: int) -> dict[str, Figures]:
    """Raw disk, saves of both kinds in turn, steps without a save, and loading in this layout.

    Args:
        rank: this process.
        folder: on the disk to be measured.
        quick: a tiny model.
        repetitions: how often each is done; the last rounds are reported one by one.
    """
    bench = Bench(rank, folder, quick=quick, tensor=1)
    bench.step()
    _reset_peak()
    bench.step()
    share = sum(run.nbytes for run in bench.engine.snapshot().runs.values())
    results: dict[str, Figures] = {
        "model": {"parameters": bench.parameters, "bytes": _sum(share)},
        "memory_before": {"peak_mib": _peak_mib()},
    }
    for number in range(repetitions):
        results[f"raw_{number}"] = _raw_disk(folder / f"raw_{rank}", share)
        for name, save in (("sync", bench.save), ("async", bench.save_beside_training)):
            plain_s = bench.step()
            _reset_peak()
            results[f"{name}_{number}"] = save() | {"plain_step_s": plain_s}
            results[f"{name}_{number}"]["peak_mib"] = _peak_mib()
    checkpoint = step_folder(folder / "run" / FOLDER, bench.saver.saved_step or 0)
    _forget(checkpoint)
    results["verify"] = {"wait_s": _timed(lambda: _assert_whole(checkpoint))}
    results["load"] = _load(bench, checkpoint)
    return results


def measure_conversion(rank: int, folder: Path, quick: bool) -> dict[str, Figures]:
    """Loading the checkpoint of two data-parallel ranks into two tensor-parallel ones."""
    bench = Bench(rank, folder, quick=quick, tensor=2)
    return {"conversion": _load(bench, checkpoint_path(folder / "run"))}


def _load(bench: Bench, checkpoint: Path) -> Figures:
    _forget(checkpoint)
    before = _resident_mib()
    _reset_peak()
    wait_s = _timed(lambda: bench.engine.load(checkpoint / WEIGHTS))
    return {"wait_s": wait_s, "grown_mib": _peak_mib() - before}


def _raw_disk(path: Path, size: int) -> Figures:
    """The same bytes written, synced and read by nothing but the system's calls."""
    block = memoryview(os.urandom(BLOCK_BYTES))

    def write() -> None:
        left = size
        with path.open("wb", buffering=0) as file:
            while left > 0:
                left -= file.write(block[: min(left, BLOCK_BYTES)]) or 0
            os.fsync(file.fileno())

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(BLOCK_BYTES):
                pass

    figures = {"write_s": _timed(write), "read_s": _timed(read)}
    path.unlink()
    return figures


def _timed(action: Callable[[], None]) -> float:
    """Seconds until all ranks have done it."""
    dist.barrier()
    started_s = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - started_s


def _sum(value: int) -> float:
    total = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def _assert_whole(checkpoint: Path) -> None:
    problems = verify_together(checkpoint)
    assert not problems, problems


def _forget(checkpoint: Path) -> None:
    """Let the files come from the disk and not from this machine's memory."""
    for path in checkpoint.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _resident_mib() -> float:
    return _status_mib("VmRSS")


def _peak_mib() -> float:
    """Most memory resident since `_reset_peak`."""
    return _status_mib("VmHWM")


def _status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"this system's /proc/self/status has no {key}")
