"""Whole training runs for tests: `pipeline.train` in ranks of the fork server, on a tiny corpus.

Each rank is what the command line starts: same `main`, same variables, same exit code. Only the
import of the libraries is spared.
"""

import importlib
import json
import multiprocessing
import multiprocessing.process
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.harness import prepared_context

# Of a clock, of the memory's history, or of the first step after a resume.
TIMES = (
    *("tokens_per_s", "step_time_s", "memory_peak_gib", "save_stall_s", "save_total_s"),
    *("resume_changes", "slowest_rank", "slowest_rank_time_s", "median_rank_time_s"),
    "stage_idle_fraction",
)
CONFIG = """
run: {name: tiny, seed: 7}
model:
  layers: 5
  hidden_size: 32
  attention_heads: 4
  kv_heads: 2
  ffn_hidden_size: 64
  vocab_size: 260
  future_tokens: 3
data: {shards: unset, sequence_length: 16}
parallel: {zero: 1}
batch: {micro_size: 4}
train: {steps: 12, precision: fp32, device: cpu, heartbeat_timeout_s: 10}
optimizer: {learning_rate: 3.0e-3}
schedule: {warmup_steps: 2}
eval: {every_steps: 4, samples: 6}
checkpoint: {every_steps: 3, keep: 2}
log: {tensorboard: false}
"""


class Outcome(NamedTuple):
    """How a job ended.

    Attributes:
        codes: exit code of each rank; negative = the signal that ended it.
        output: what each rank wrote to stdout and stderr.
    """

    codes: list[int]
    output: list[str]

    @property
    def errors(self) -> list[str]:
        """The error lines of all ranks."""
        lines = "".join(self.output).splitlines()
        return [line for line in lines if line.startswith("error:")]


class RunningJob:
    """Ranks of a training job that may be signalled before they are waited for."""

    def __init__(
        self, processes: Sequence[multiprocessing.process.BaseProcess], outputs: list[Path]
    ) -> None:
        self._processes = processes
        self._outputs = outputs

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one rank."""
        pid = self._processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def lift_file_limit(self, rank: int) -> None:
        """Let a rank write files of any size again."""
        pid = self._processes[rank].pid
        assert pid is not None
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)

    def output(self, rank: int) -> str:
        """What a rank has written so far."""
        return self._outputs[rank].read_text(encoding="utf-8")

    def is_alive(self, rank: int) -> bool:
        """Whether a rank still runs."""
        return self._processes[rank].is_alive()

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait for something the job does; fail when it ends or takes too long before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s:\n{self._text()}"
            assert any(p.is_alive() for p in self._processes), f"ended before:\n{self._text()}"
            time.sleep(0.01)

    def finish(self, timeout_s: float = 120.0) -> Outcome:
        """Wait for all ranks to end; those that do not are killed, and the test fails."""
        deadline = time.monotonic() + timeout_s
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, p in enumerate(self._processes) if p.is_alive()]
        for process in self._processes:
            process.kill()
            process.join()
        assert not late, f"ranks {late} ran past {timeout_s} s:\n{self._text()}"
        codes = [process.exitcode for process in self._processes]
        return Outcome(
            [code if code is not None else -1 for code in codes],
            [path.read_text(encoding="utf-8") for path in self._outputs],
        )

    def _text(self) -> str:
        return "\n".join(path.read_text(encoding="utf-8") for path in self._outputs)


def start_job(
    folder: Path,
    arguments: Sequence[str],
    *,
    world: int,
    environment: Mapping[str, str] = {},
    file_limits: Mapping[int, int] = {},
    module: str = "pipeline.train",
    more_arguments: Mapping[int, Sequence[str]] = {},
) -> RunningJob:
    """Start `python -m pipeline.train ARGUMENTS` on `world` ranks.

    Args:
        folder: where the ranks' output goes.
        arguments: of the command line.
        world: number of ranks.
        environment: variables that differ from the ranks' usual ones.
        file_limits: by rank, the size in bytes past which it cannot write a file.
        module: another command.
        more_arguments: by rank, what only it is given.
    """
    context = prepared_context()
    port = str(free_port())
    outputs = [folder / f"output_{time.monotonic_ns()}_{rank}.txt" for rank in range(world)]
    processes = []
    for rank, output in enumerate(outputs):
        output.touch()
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            **environment,
        }
        process = context.Process(
            target=_rank_main,
            args=(
                module,
                [*arguments, *more_arguments.get(rank, ())],
                variables,
                output,
                file_limits.get(rank),
            ),
            daemon=False,
        )
        process.start()
        processes.append(process)
    return RunningJob(processes, outputs)


def run_job(
    folder: Path, arguments: Sequence[str], *, world: int = 1, timeout_s: float = 120.0
) -> Outcome:
    """Run a training job to its end."""
    return start_job(folder, arguments, world=world).finish(timeout_s)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def metrics_without_times(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, without what a clock or the memory's history decides."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def last_step(run_dir: Path) -> int:
    """The last step in the metrics so far; 0 before the first."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _rank_main(
    module: str,
    arguments: list[str],
    variables: dict[str, str],
    output: Path,
    file_limit: int | None,
) -> None:
    import torch

    if file_limit is not None:
        _, highest = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, highest))
    os.environ.update(variables)
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8")
    code = 99
    try:
        code = importlib.import_module(module).main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
