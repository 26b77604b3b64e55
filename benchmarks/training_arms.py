"""What trains in `benchmarks/training.py`, each in a process of its own: a turn is some steps.

An arm is a generator: it builds its model, then takes a turn for each `next` and yields how long
the turn took, and the most memory it has used so far.
"""

import gc
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Turn = tuple[float, int]


@dataclass(frozen=True)
class Workload:
    """A model and a step.

    Attributes:
        layers: trunk and heads together, so that parameters do not depend on their number.
        hidden: H; attention heads are 64 wide.
        vocabulary: V.
        batch: sequences of a micro-batch.
        sequence: S.
        accumulation: micro-batches of a step.
        steps: of a turn.
    """

    layers: int
    hidden: int
    vocabulary: int
    batch: int
    sequence: int
    accumulation: int
    steps: int

    @property
    def ffn(self) -> int:
        """Width of the feed-forward layers: 8/3 H in multiples of 64."""
        return -(-self.hidden * 8 // 3 // 64) * 64

    @property
    def tokens(self) -> int:
        """Of a turn."""
        return self.batch * self.sequence * self.accumulation * self.steps


class Arm(NamedTuple):
    """One way to train.

    Attributes:
        kind: which generator.
        heads: n.
        zero: ZeRO level, for those that have one.
        backward: of this project's engine.
        is_compiled: plain PyTorch with torch.compile, of each layer and of the loss.
    """

    kind: str
    heads: int
    zero: int = 1
    backward: str = "sequential"
    is_compiled: bool = False


def run_arm(arm: Arm, workload: Workload, device_type: str) -> Iterator[Turn]:
    """The arm's turns; call in a fresh process, whose peak of memory it reads."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if device_type == "cpu" else "cuda")
    makers: dict[str, Callable[..., Iterator[Turn]]] = {
        "headway": _headway,
        "plain": _plain,
        "trainer": _trainer,
    }
    return makers[arm.kind](arm, workload, torch.device(device_type))


class _Meter:
    """Time of turns, and the memory that an arm has taken since it began."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def turn(self, take: Callable[[], Any]) -> Turn:
        self._wait()
        started = time.perf_counter()
        take()
        self._wait()
        return time.perf_counter() - started, self.peak()

    def peak(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._base) * 1024

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _batches(workload: Workload, heads: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Tokens `[B, S]` and labels `[n, B, S]` of a step's micro-batches."""
    generator, found = torch.Generator().manual_seed(1), []
    length = workload.sequence
    for _ in range(workload.accumulation):
        shape = (workload.batch, length + heads)
        window = torch.randint(0, workload.vocabulary, shape, generator=generator)
        labels = torch.stack([window[:, k : k + length] for k in range(1, heads + 1)])
        found.append((window[:, :length].contiguous().to(device), labels.to(device)))
    return found


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _headway(arm: Arm, workload: Workload, device: torch.device) -> Iterator[Turn]:
    """This project's engine, as `pipeline.train` builds it."""
    import torch.distributed as dist

    from data_prep.loading.loader import Batch
    from pipeline.config.run_config import RunConfig
    from pipeline.distributed.rendezvous import RankInfo
    from pipeline.distributed.topology import Topology
    from pipeline.engine.build import build_engine

    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    meter = _Meter(device)
    config = RunConfig.model_validate(
        {
            "run": {"name": "benchmark"},
            "model": {
                "layers": workload.layers,
                "hidden_size": workload.hidden,
                "attention_heads": workload.hidden // 64,
                "ffn_hidden_size": workload.ffn,
                "vocab_size": workload.vocabulary,
                "future_tokens": arm.heads,
            },
            "data": {"shards": "unused", "sequence_length": workload.sequence},
            "parallel": {"zero": arm.zero},
            "batch": {"micro_size": workload.batch, "accumulation": workload.accumulation},
            "train": {"steps": 1000, "device": device.type, "head_backward": arm.backward},
            "optimizer": {"learning_rate": 3e-4},
            "schedule": {"warmup_steps": 1},
        }
    )
    topology = Topology(RankInfo(0, 0, 1), 1, device)
    engine = build_engine(config, topology, "bf16" if device.type == "cuda" else "fp32")
    batches = [Batch(*pair) for pair in _batches(workload, arm.heads, device)]
    while True:
        yield meter.turn(lambda: [engine.train_step(batches, 3e-4) for _ in range(workload.steps)])


def _plain(arm: Arm, workload: Workload, device: torch.device) -> Iterator[Turn]:
    """A training loop in plain PyTorch: bf16 autocast on a GPU, torch's AdamW and clipping."""
    from benchmarks.plain_model import PlainModel

    meter = _Meter(device)
    model = PlainModel(
        trunk_layers=workload.layers - arm.heads,
        future_tokens=arm.heads,
        hidden=workload.hidden,
        ffn=workload.ffn,
        vocabulary=workload.vocabulary,
    ).to(device)
    if arm.is_compiled:
        model.compile_parts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
    batches = _batches(workload, arm.heads, device)

    def steps() -> None:
        for _ in range(workload.steps):
            for tokens, labels in batches:
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    loss = model(tokens, labels) / len(batches)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    while True:
        yield meter.turn(steps)


def _trainer(arm: Arm, workload: Workload, device: torch.device) -> Iterator[Turn]:
    """`transformers.Trainer` with DeepSpeed on a Llama of the same size; it has one head."""
    import threading
    from queue import Queue

    import transformers

    from pipeline.engine.deepspeed_internals import keep_off_shared_memory

    assert arm.heads == 1, "transformers trains one head"
    if device.type == "cpu":  # an op that one rank has no use for, and would be compiled
        keep_off_shared_memory()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    go: Queue[None] = Queue()
    done: Queue[Turn | BaseException] = Queue()
    meter = _Meter(device)

    class Turns(transformers.TrainerCallback):
        """Holds training up between turns."""

        started = 0.0

        def on_step_begin(self, _: Any, state: Any, __: Any, **___: Any) -> None:
            if state.global_step % workload.steps == 0:
                go.get()
                Turns.started = time.perf_counter()

        def on_step_end(self, _: Any, state: Any, __: Any, **___: Any) -> None:
            if state.global_step % workload.steps == 0:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                done.put((time.perf_counter() - Turns.started, meter.peak()))

    def train() -> None:
        try:
            _make_trainer(arm, workload, device, Turns()).train()
        except BaseException as error:
            done.put(error)

    threading.Thread(target=train, daemon=True).start()
    while True:
        go.put(None)
        result = done.get()
        if isinstance(result, BaseException):
            raise result
        yield result


def _make_trainer(arm: Arm, workload: Workload, device: torch.device, turns: Any) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=workload.vocabulary,
        hidden_size=workload.hidden,
        intermediate_size=workload.ffn,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.hidden // 64,
        max_position_embeddings=workload.sequence,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    rows = [row for tokens, _ in _batches(workload, 1, torch.device("cpu")) for row in tokens]
    data = [{"input_ids": row, "labels": row} for row in rows] * 1000
    is_gpu = device.type == "cuda"
    options = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="trainer-"),
        per_device_train_batch_size=workload.batch,
        gradient_accumulation_steps=workload.accumulation,
        max_steps=10_000,
        learning_rate=3e-4,
        max_grad_norm=1.0,
        bf16=is_gpu,
        use_cpu=not is_gpu,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        deepspeed={
            "train_micro_batch_size_per_gpu": workload.batch,
            "gradient_accumulation_steps": workload.accumulation,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": is_gpu},
            "zero_optimization": {"stage": arm.zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    gc.collect()
    return transformers.Trainer(model=model, args=options, train_dataset=data, callbacks=[turns])
