"""Throughput of `model.serve` beside `transformers serve` on the same export, for many clients.

`python benchmarks/serving.py [EXPORT]` takes the export of the quickstart unless another is named.
Every server gets the same requests, greedy completions of the same prompts, from 64 clients that
each send the next one when they have an answer. Servers take turns, and the ones that wait are
stopped (SIGSTOP); the best of the rounds counts, since other work can only add. *CPU* is the time
that the server's process computed, by which a busy machine can still be compared; clients run in
another process. `transformers serve` needs `pip install 'transformers[serving]'` and is left out
where that is missing. `--quick` sends few requests and writes nothing.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import openai
import psutil
from transformers.utils.import_utils import is_serve_available

from benchmarks.decoding import PROMPTS
from benchmarks.tables import machine_line, replace_section
from model.hugging_face.folder import read_record

ROOT = Path(__file__).resolve().parent.parent
_START_S = 300
_CLIENTS = 64


class Round(NamedTuple):
    """What one server did in one round.

    Attributes:
        seconds: from the first request to the last answer.
        cpu_s: that the server computed meanwhile.
        tokens: new ones.
        latencies_s: of each request.
        texts: of each request.
    """

    seconds: float
    cpu_s: float
    tokens: int
    latencies_s: list[float]
    texts: list[str]


class Server:
    """A server in a process of its own, which stands still but in its turns.

    Args:
        name: for the table.
        command: starts it.
        port: where it listens.
        model: what it calls the model.
    """

    def __init__(self, name: str, command: Sequence[str], port: int, model: str) -> None:
        self.name = name
        self._model = model
        self._url = f"http://127.0.0.1:{port}/v1"
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
            deadline = time.monotonic() + _START_S
            while not self._answers(port):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    log.seek(0)
                    said = log.read().decode(errors="replace")
                    raise SystemExit(f"{name} did not start: {' '.join(command)}\n{said}")
                time.sleep(0.2)

    @staticmethod
    def _answers(port: int) -> bool:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return True
        return False

    def turn(self, requests: int, clients: int, tokens: int) -> Round:
        """Let it answer some requests."""
        self._process.send_signal(signal.SIGCONT)
        try:
            return asyncio.run(self._turn(requests, clients, tokens))
        finally:
            self._process.send_signal(signal.SIGSTOP)

    async def _turn(self, requests: int, clients: int, tokens: int) -> Round:
        waiting = iter(range(requests))
        texts, latencies = [""] * requests, [0.0] * requests
        counts = [0] * requests

        async def client(api: openai.AsyncOpenAI) -> None:
            for number in waiting:
                start_s = time.perf_counter()
                answer = await api.completions.create(
                    model=self._model,
                    prompt=PROMPTS[number % len(PROMPTS)],
                    max_tokens=tokens,
                    temperature=0,
                )
                latencies[number] = time.perf_counter() - start_s
                texts[number] = answer.choices[0].text
                assert answer.usage is not None
                counts[number] = answer.usage.completion_tokens

        async with openai.AsyncOpenAI(base_url=self._url, api_key="none", timeout=600) as api:
            start_s, start_cpu_s = time.perf_counter(), self._cpu_s()
            await asyncio.gather(*(client(api) for _ in range(clients)))
            seconds, cpu_s = time.perf_counter() - start_s, self._cpu_s() - start_cpu_s
        return Round(seconds, cpu_s, sum(counts), latencies, texts)

    def _cpu_s(self) -> float:
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def commands(
    export: Path, heads: Sequence[str], batch: int
) -> Iterator[tuple[str, list[str], int]]:
    """Names, commands and ports of the servers to compare."""
    ours = [sys.executable, "-m", "model.serve", str(export), "--queue", "100000"]
    for k in heads:
        port = _free_port()
        name = "model.serve, " + ("1 head" if k == "1" else f"{k} heads")
        yield name, [*ours, "--heads", k, "--max-batch", str(batch), "--port", str(port)], port
    if not is_serve_available():
        return
    theirs = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    theirs += ["serve", str(export), "--device", "cpu"]
    for name, more in (("", []), (", continuous batching", ["--continuous-batching"])):
        port = _free_port()
        yield f"transformers serve{name}", [*theirs, *more, "--port", str(port)], port


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def table(rounds: dict[str, list[Round]]) -> str:
    """One row for each server; the first one's texts are what the others are compared with."""
    expected = next(iter(rounds.values()))[0].texts
    lines = [
        "| server | tokens/s | tokens per CPU second | median latency, ms | 95 %, ms "
        "| text equal |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in rounds.items():
        best = min(found, key=lambda one: one.seconds)
        cpu = max(one.tokens / max(one.cpu_s, 1e-9) for one in found)
        ordered = sorted(best.latencies_s)
        same = sum(a == b for one in found for a, b in zip(one.texts, expected, strict=True))
        cells = [
            name,
            f"{best.tokens / best.seconds:,.0f}",
            f"{cpu:,.0f}",
            f"{1000 * ordered[len(ordered) // 2]:,.0f}",
            f"{1000 * ordered[len(ordered) * 95 // 100]:,.0f}",
            f"{same / len(expected) / len(found):.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, prog="serving.py")
    parser.add_argument("export", type=Path, nargs="?", default=Path("runs/quickstart/export"))
    parser.add_argument("--output", type=Path, help="where README.md and results/ are (nowhere)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=192, help="in a round of one server")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--batch", type=int, default=16, help="texts that model.serve runs at once")
    parser.add_argument("--heads", nargs="+", default=["1", "2", "3"], help="of model.serve")
    parser.add_argument("--quick", action="store_true", help="few requests; writes nothing")
    options = parser.parse_args(arguments)
    clients = _CLIENTS
    if options.quick:
        options.rounds, options.requests, options.tokens, options.output = 1, 8, 4, None
        options.heads, clients = options.heads[:1], 4
    description = read_record(options.export).description
    servers: list[Server] = []
    rounds: dict[str, list[Round]] = {}
    try:
        for name, command, port in commands(options.export, options.heads, options.batch):
            model = description.run if name.startswith("model.serve") else str(options.export)
            servers.append(Server(name, command, port, model))
            servers[-1].turn(min(clients, options.requests), clients, options.tokens)  # warm
        for _ in range(options.rounds):
            for server in servers:
                one = server.turn(options.requests, clients, options.tokens)
                rounds.setdefault(server.name, []).append(one)
                print(f"{server.name}: {one.tokens / one.seconds:,.0f} tokens/s", flush=True)
    finally:
        for server in servers:
            server.stop()
    print(table(rounds), flush=True)
    if options.output is not None:
        machine = machine_line("cpu", ("torch", "transformers"))
        model_sizes = description.model
        intro = (
            f"{machine} {description.run}: {model_sizes.num_parameters() / 1e6:.1f} M parameters; "
            f"{clients} clients, {options.requests} requests of up to {options.tokens} new tokens, "
            f"--max-batch {options.batch}, one thread, best of {options.rounds} rounds."
        )
        replace_section(options.output / "README.md", "serving", f"{intro}\n\n{table(rounds)}")
        raw = options.output / "results" / "serving.json"
        raw.parent.mkdir(exist_ok=True)
        content = {
            name: [one._replace(texts=[])._asdict() for one in found]
            for name, found in rounds.items()
        }
        raw.write_text(
            json.dumps({"machine": machine, "rounds": content}, indent=1) + "\n", "utf-8"
        )


if __name__ == "__main__":
    main()
