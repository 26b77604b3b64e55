"""Speed of decoding an export: 1 to n heads as chains, trees, and `transformers` on the same files.

`python benchmarks/decoding.py [EXPORT]` takes the export of the quickstart unless another is named.
All arms read the same weights and continue the same prompts by the same number of tokens, in one
process and in turn; the best of the rounds counts, since other work can only add. On a CPU one
thread computes, and its own time counts instead of the clock's. *transformers* is `generate` of the
plain Llama in the folder, *prompt lookup* its speculative decoding with n-grams of the text, *auto*
the chain that `--heads auto` takes for a batch of that size on this machine.
`--early-exit ADAPTER` adds its drafts, at some thresholds.
`--quick` takes few tokens and rounds and writes nothing.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import transformers

from benchmarks.tables import machine_line, replace_section
from model.decoding.batch import Decoder
from model.decoding.chain import ChainDecoder
from model.decoding.generation import Generation, collect, stream
from model.decoding.head_choice import automatic_heads
from model.decoding.sampling import GREEDY, Sampling
from model.decoding.tree import TreeDecoder
from model.early_exit.decoder import EarlyExitDecoder
from model.early_exit.loading import load_early_exit
from model.early_exit.network import EarlyExitNetwork
from model.inference.loading import LoadedNetwork, load_network

PROMPTS = (
    "def __init__(self, ",
    "import os\nimport sys\n",
    "class Node:\n    def __init__(",
    "    for line in lines:\n        ",
    "    if not isinstance(",
    "try:\n    import ",
    "    return self.",
    "    with open(path",
    "        raise ValueError(",
    "def main():\n    parser = ",
    "    def test_",
    "        self.assertEqual(",
    "    while True:\n",
    "from collections import ",
    "        except OSError as ",
    "def _parse(text, ",
)
SAMPLED = Sampling(temperature=1.0)
_FEWEST = 4  # prompts, one after the other where a batch has fewer
LOOKED_UP = 3  # tokens that prompt lookup drafts
THRESHOLDS = (0.3, 0.6, 0.9)  # of an early exit
MOST_DRAFTS = 6


class Result(NamedTuple):
    """The best round of one arm.

    Attributes:
        arm: its name.
        batch: prompts at once.
        sampled: at temperature 1; else greedy.
        tokens: new tokens of all prompts.
        per_forward: mean tokens that a forward after the prompts' gave a text; None = not known.
        forwards: of all batches; None = not known.
        seconds: for all of it.
        first_s: until the first tokens were there, summed over batches.
        equal: whether the texts are those of transformers; None when sampled.
    """

    arm: str
    batch: int
    sampled: bool
    tokens: int
    per_forward: float | None
    forwards: int | None
    seconds: float
    first_s: float
    equal: bool | None

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all prompts per second, reading the prompts included."""
        return self.tokens / self.seconds


class Output(NamedTuple):
    """What a run of an arm gave."""

    texts: list[list[int]]
    per_forward: float | None
    forwards: int | None
    first_s: float


Arm = Callable[[], Output]


class Bench:
    """Arms over one export.

    Args:
        folder: the export.
        device: where everything runs.
        num_tokens: new tokens of each prompt.
        adapter: export of an early-exit adapter; None = there is none.
    """

    def __init__(
        self, folder: Path, device: str, num_tokens: int, adapter: Path | None = None
    ) -> None:
        self.folder = folder
        self.loaded: LoadedNetwork = load_network(folder, device=torch.device(device))
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        plain = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=self.loaded.network.dtype
        )
        self.plain = plain.to(device).eval()
        self.device = device
        self.num_tokens = num_tokens
        encode = self.loaded.tokenizer.encode
        self.early_exit = None
        if adapter is not None:
            self.early_exit = load_early_exit(adapter, folder, self.loaded.network)
        self.prompts = [encode(text, add_special_tokens=False).ids for text in PROMPTS]

    def clock(self) -> float:
        """Seconds: of this process's own work on a CPU, of the clock on a GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def arms(self, batch: int, sampled: bool, spreads: Sequence[int]) -> dict[str, Arm]:
        """What is measured at one batch size, by name; transformers first."""
        sampling = SAMPLED if sampled else GREEDY
        heads = range(1, self.loaded.network.num_heads + 1)
        arms: dict[str, Arm] = {"transformers": self._transformers(batch, sampled)}
        if batch == 1 and not sampled:
            arms["prompt lookup"] = self._transformers(
                batch, sampled, prompt_lookup_num_tokens=LOOKED_UP
            )
        for k in heads:
            name = "1 head" if k == 1 else f"chain of {k}"
            arms[name] = self._ours(batch, self._chain(k, sampling))
        for k in heads[1:]:
            for spread in spreads:
                arms[f"tree of {k}, spread {spread}"] = self._ours(
                    batch, self._tree(k, spread, sampling)
                )
        if self.early_exit is not None:
            for threshold in THRESHOLDS:
                arms[f"early exit at layer {self.early_exit.layer}, threshold {threshold}"] = (
                    self._ours(batch, self._exit(self.early_exit, threshold, sampling))
                )
        if not sampled:
            k = automatic_heads(self.folder, self.loaded.network, [batch], print).most
            arms[f"auto: {k} {'head' if k == 1 else 'heads'}"] = self._ours(
                batch, self._chain(k, sampling)
            )
        return arms

    def _chain(self, heads: int, sampling: Sampling) -> Callable[[], Decoder]:
        return lambda: ChainDecoder(self.loaded.network, heads=heads, sampling=sampling)

    def _tree(self, heads: int, spread: int, sampling: Sampling) -> Callable[[], Decoder]:
        return lambda: TreeDecoder(
            self.loaded.network, heads=heads, spread=spread, sampling=sampling
        )

    def _exit(
        self, network: EarlyExitNetwork, threshold: float, sampling: Sampling
    ) -> Callable[[], Decoder]:
        return lambda: EarlyExitDecoder(
            network, threshold=threshold, most_drafts=MOST_DRAFTS, sampling=sampling
        )

    def _batches(self, size: int) -> list[list[list[int]]]:
        """One batch, or some small ones, so that no single prompt decides."""
        used = self.prompts[: max(size, _FEWEST)]
        return [used[start : start + size] for start in range(0, len(used), size)]

    def _ours(self, size: int, decoder: Callable[[], Decoder]) -> Arm:
        def run() -> Output:
            blocks: list[list[list[int]]] = []
            forwards, first_s = 0, 0.0
            for prompts in self._batches(size):
                start = self.clock()
                pieces = stream(decoder(), prompts, max_new_tokens=self.num_tokens)
                first = next(pieces)
                first_s += self.clock() - start
                found = collect(itertools.chain([first], pieces), len(prompts))
                blocks += found.blocks
                forwards += found.forwards
            whole = Generation(blocks, forwards)
            return Output(whole.tokens, whole.tokens_per_forward, forwards, first_s)

        return run

    def _transformers(self, size: int, sampled: bool, **more: Any) -> Arm:
        options: dict[str, Any] = {"do_sample": sampled, "pad_token_id": 0, "eos_token_id": None}
        if sampled:
            options |= {"temperature": SAMPLED.temperature, "top_k": 0, "top_p": 1.0}

        def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
            longest = max(map(len, prompts))
            pads = [[0] * (longest - len(prompt)) for prompt in prompts]
            tokens = [pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]
            mask = [pad + [1] * len(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
            with torch.inference_mode():
                found = self.plain.generate(
                    torch.tensor(tokens, device=self.device),
                    attention_mask=torch.tensor(mask, device=self.device),
                    max_new_tokens=count,
                    **options,
                    **more,
                )
            rows: list[list[int]] = found[:, longest:].tolist()
            return rows

        def run() -> Output:
            batches = self._batches(size)
            start = self.clock()
            for prompts in batches:
                generate(prompts, 1)
            first_s = self.clock() - start
            texts = [text for prompts in batches for text in generate(prompts, self.num_tokens)]
            if more:
                return Output(texts, None, None, first_s)
            return Output(texts, 1.0, self.num_tokens * len(batches), first_s)

        return run


def measure(
    bench: Bench, batch: int, sampled: bool, spreads: Sequence[int], rounds: int
) -> list[Result]:
    """The best of some rounds of every arm; one round before them does not count."""
    arms = bench.arms(batch, sampled, spreads)
    best: dict[str, tuple[float, float]] = {}
    outputs: dict[str, Output] = {}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            start = bench.clock()
            output = outputs[name] = arm()
            seconds = bench.clock() - start
            if name in ("transformers", "prompt lookup"):
                seconds -= output.first_s  # a run of its own there
            if number:
                old = best.get(name, (seconds, output.first_s))
                best[name] = (min(old[0], seconds), min(old[1], output.first_s))
    expected = outputs["transformers"].texts
    return [
        Result(
            name,
            batch,
            sampled,
            sum(map(len, output.texts)),
            output.per_forward,
            output.forwards,
            *best[name],
            None if sampled else output.texts == expected,
        )
        for name, output in outputs.items()
    ]


def table(results: Sequence[Result]) -> str:
    """One row for each arm; ratios are to transformers at the same batch."""
    lines = [
        "| batch | | decoder | tokens per forward | tokens/s | / transformers | ms per forward "
        "| first token, ms | text equal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = {(r.batch, r.sampled): r.tokens_per_s for r in results if r.arm == "transformers"}
    for result in results:
        batches = max(_FEWEST // result.batch, 1)
        later = None if result.forwards is None else max(result.forwards - batches, 1)
        each = None if later is None else 1000 * (result.seconds - result.first_s) / later
        cells = [
            str(result.batch),
            "sampled" if result.sampled else "greedy",
            result.arm,
            "-" if result.per_forward is None else f"{result.per_forward:.2f}",
            f"{result.tokens_per_s:,.0f}",
            f"{result.tokens_per_s / base[result.batch, result.sampled]:.2f}",
            "-" if each is None else f"{each:.2f}",
            f"{1000 * result.first_s / batches:.1f}",
            {None: "-", True: "yes", False: "no"}[result.equal],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, prog="decoding.py")
    parser.add_argument("export", type=Path, nargs="?", default=Path("runs/quickstart/export"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="where README.md and results/ are (nowhere)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=96, help="new tokens of each prompt")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 4, 16], help="prompts at once"
    )
    parser.add_argument("--spreads", type=int, nargs="+", default=[1, 2], help="of trees")
    parser.add_argument("--early-exit", type=Path, metavar="ADAPTER", help="its export (none)")
    parser.add_argument("--quick", action="store_true", help="few tokens; prints, writes nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.quick:
        options.tokens, options.rounds, options.output = 6, 1, None
        options.batches, options.spreads = [1, 2], [1]
    bench = Bench(options.export, options.device, options.tokens, options.early_exit)
    results: list[Result] = []
    for batch in options.batches:
        for sampled in (False, True):
            results += measure(bench, batch, sampled, options.spreads, options.rounds)
            print(table(results), flush=True)
    if options.output is not None:
        description = bench.loaded.record.description
        machine = machine_line(options.device, ("torch", "transformers"))
        model = description.model
        intro = (
            f"{machine} {description.run}: {model.num_parameters() / 1e6:.1f} M parameters, "
            f"{model.layers} layers, {model.future_tokens} of them heads, step {description.step}, "
            f"in {description.dtype}; {options.tokens} new tokens, best of {options.rounds} rounds."
        )
        run = "" if description.run == "quickstart" else f"{description.run} "
        usual = {"cpu": "fp32", "cuda": "bf16"}[options.device]
        dtype = "" if description.dtype == usual else f"{description.dtype} "
        name = f"decoding {run}{dtype}{options.device}"
        replace_section(options.output / "README.md", name, f"{intro}\n\n{table(results)}")
        raw = options.output / "results" / f"{name.replace(' ', '-')}.json"
        raw.parent.mkdir(exist_ok=True)
        content = {"machine": machine, "results": [r._asdict() for r in results]}
        raw.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
