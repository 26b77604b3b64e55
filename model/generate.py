"""Command line: text from an export, `python -m model.generate DIR --prompt TEXT`.

The heads draft, head 1 verifies: at temperature 0 the text is the one head 1 gives alone.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from foundation.shown_text import printable, told
from model.errors import CheckpointError, ConfigError
from model.hugging_face.config import first_token
from model.hugging_face.folder import read_record

if TYPE_CHECKING:
    import torch

    from model.decoding.self_speculative import Generation
    from model.hugging_face.loading import LoadedExport

EXIT_USER_ERROR = 1
EXIT_DIFFERENT = 3
EXIT_INTERRUPTED = 130

_COMPARE_ROUNDS = 2
_MOST_NEW_TOKENS = 1 << 20
# Below this, threads wait for one another longer than they compute, far longer on a busy machine.
_ONE_THREAD_PARAMETERS = 30_000_000

EPILOG = """\
examples:
  PROG export --prompt "def main():"
  PROG export --prompt "Once" --heads 3 --max-new-tokens 200 --temperature 0.8 --seed 1
  PROG export --prompt "import os" --compare

exit status: 0 the text is printed, 1 the model or a prompt cannot be used (in one line), 2 wrong
arguments, 3 --compare found different outputs
"""


class Run(NamedTuple):
    """One timed generation."""

    generation: "Generation"
    heads: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all prompts per second, reading the prompts included."""
        return self.generation.num_tokens / self.seconds

    def summary(self) -> str:
        """One line of counts."""
        result = self.generation
        return (
            f"{self.heads} {'head' if self.heads == 1 else 'heads'}: "
            f"{result.num_tokens} tokens, {result.forwards} forwards, "
            f"{result.tokens_per_forward:.2f} tokens per forward, {self.tokens_per_s:.1f} tokens/s"
        )


def main(arguments: Sequence[str] | None = None, prog: str = "python -m model.generate") -> int:
    """Run the command; give its exit status."""
    options = _parse(arguments, prog)
    # megatron-core warns of parts that are not installed and that nothing here uses.
    warnings.filterwarnings("ignore", category=UserWarning)
    try:
        return _generate(options)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Continue prompts with an exported model; its own heads speed it up.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="what python -m pipeline.export has written")
    add("--prompt", action="append", required=True, metavar="TEXT", help="may be given many times")
    add("--heads", type=int, metavar="K", help="heads to use, 1 = plain decoding (all)")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="for each prompt (64)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 = the likeliest token (0)")
    add("--seed", type=int, default=0, metavar="S", help="for a temperature above 0 (0)")
    add("--dtype", choices=("fp32", "bf16"), help="arithmetic (as exported)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs (auto)")
    add("--ids", action="store_true", help="print the ids of the new tokens, too")
    add(
        "--compare",
        action="store_true",
        help=f"run with 1 head and with K; exit status {EXIT_DIFFERENT} when the outputs differ",
    )
    return parser.parse_args(arguments)


def _generate(options: argparse.Namespace) -> int:
    _check_numbers(options)
    heads = _heads(options.heads, read_record(options.directory).future_tokens)
    # Imported here so that --help and mistakes do not wait for torch and megatron-core.
    from model.hugging_face.loading import DTYPES, load_export

    device = _device(options.device)
    loaded = load_export(options.directory, DTYPES[options.dtype] if options.dtype else None)
    begin = first_token(options.directory, loaded.record.description.model.vocab_size)
    prompts = _encode(options.prompt, options.max_new_tokens, loaded, begin)
    _move(loaded, device)
    counts = [1, heads] if options.compare else [heads]
    # The first run on a machine pays for what is set up once; the faster of two is reported.
    rounds = [
        [_run(loaded, prompts, count, options, device) for count in counts]
        for _ in range(_COMPARE_ROUNDS if options.compare else 1)
    ]
    runs = [min(times, key=lambda run: run.seconds) for times in zip(*rounds, strict=True)]
    _print_texts(options, loaded, prompts, runs[-1])
    for run in runs:
        print(run.summary())
    return _print_comparison(*runs) if options.compare else 0


def _check_numbers(options: argparse.Namespace) -> None:
    if options.heads is not None and options.heads < 1:
        raise ConfigError(f"--heads {options.heads} must be at least 1; 1 is plain decoding")
    if not 1 <= options.max_new_tokens <= _MOST_NEW_TOKENS:
        raise ConfigError(
            f"--max-new-tokens {printable(str(options.max_new_tokens))} must be at least 1 and "
            f"at most {_MOST_NEW_TOKENS:,}; the default is 64"
        )
    # Outside, probabilities in fp32 are all zero, or all equal.
    if options.temperature != 0 and not 1e-3 <= options.temperature <= 1e3:
        raise ConfigError(
            f"--temperature {options.temperature:g} must be 0 or a positive number from "
            "0.001 to 1,000; "
            "0 takes the likeliest token, 1 samples from the model as it is"
        )
    if not 0 <= options.seed < 1 << 63:
        given = printable(str(options.seed))
        raise ConfigError(f"--seed {given} must be from 0 to 2^63 - 1; the default is 0")
    if options.compare and options.temperature > 0:
        raise ConfigError(
            f"--compare needs --temperature 0, not {options.temperature:g}: sampled outputs agree "
            "in distribution, not token by token; leave one of the two out"
        )


def _device(wanted: str) -> "torch.device":
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda, but this process sees no CUDA device; check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES or use --device cpu"
        )
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def _heads(wanted: int | None, available: int) -> int:
    if wanted is None:
        return available
    if wanted > available:
        raise ConfigError(
            f"--heads {printable(str(wanted))}, but this export has {available}; use 1 to "
            f"{available}"
        )
    return wanted


def _encode(
    texts: Sequence[str], max_new_tokens: int, loaded: "LoadedExport", begin: int | None
) -> list[list[int]]:
    """Ids of each prompt; an empty one becomes the token that begins a text, if there is one."""
    description = loaded.record.description
    limit = description.sequence_length
    prompts = []
    for number, text in enumerate(texts, 1):
        if not _is_unicode(text):
            raise ConfigError(
                f"prompt {number} is not UTF-8 text; convert it to UTF-8, or give another --prompt"
            )
        ids = loaded.tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            if begin is None:
                raise ConfigError(
                    f"prompt {number} is empty, and this model was not trained to begin a text: "
                    "bos_token_id in its config.json is null; give the beginning of one"
                )
            ids = [begin]
        if len(ids) >= limit:
            raise ConfigError(
                f"prompt {number} has {len(ids)} tokens, the model was trained on sequences of "
                f"{limit}; shorten it to at most {limit - 1} tokens"
            )
        prompts.append(ids)
    longest = max(map(len, prompts))
    if longest + max_new_tokens > limit:
        print(
            f"note: a prompt of {longest} tokens and {max_new_tokens} new ones may pass position "
            f"{limit}, the last one the model was trained on; the text may get worse from there",
            file=sys.stderr,
        )
    return prompts


def _is_unicode(text: str) -> bool:
    """Whether it is text; bytes of a command line that are none come as halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _move(loaded: "LoadedExport", device: "torch.device") -> None:
    import torch

    loaded.model.to(device)
    if (
        device.type == "cpu"
        and loaded.record.description.model.num_parameters() < _ONE_THREAD_PARAMETERS
    ):
        torch.set_num_threads(1)


def _run(
    loaded: "LoadedExport",
    prompts: list[list[int]],
    heads: int,
    options: argparse.Namespace,
    device: "torch.device",
) -> Run:
    import torch

    from model.decoding.self_speculative import generate

    start = time.perf_counter()
    try:
        result = generate(
            loaded.model,
            prompts,
            heads=heads,
            max_new_tokens=options.max_new_tokens,
            eos_id=loaded.record.description.eos_id,
            temperature=options.temperature,
            generator=torch.Generator(device).manual_seed(options.seed),
            device=device,
        )
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        raise ConfigError(
            f"--max-new-tokens {options.max_new_tokens}: no memory for the keys and values of so "
            "many tokens; give a smaller number, or fewer prompts"
        ) from error
    return Run(result, heads, time.perf_counter() - start)


def _print_texts(
    options: argparse.Namespace, loaded: "LoadedExport", prompts: list[list[int]], run: Run
) -> None:
    eos_id = loaded.record.description.eos_id
    for text, prompt, new in zip(options.prompt, prompts, run.generation.tokens, strict=True):
        # Decoded together, so that pieces of one character meet; the prompt stays as it was given.
        begin = loaded.tokenizer.decode(prompt, skip_special_tokens=True)
        kept = [token for token in new if token != eos_id]
        whole = loaded.tokenizer.decode(prompt + kept, skip_special_tokens=True)
        print(text + whole.removeprefix(begin) if whole.startswith(begin) else whole)
        if options.ids:
            print("ids:", " ".join(map(str, new)))
        print("---")


def _print_comparison(plain: Run, speculative: Run) -> int:
    """Say whether both runs gave the same tokens; give the exit status."""
    differences = [
        (prompt, position)
        for prompt, (a, b) in enumerate(
            zip(plain.generation.tokens, speculative.generation.tokens, strict=True), 1
        )
        if (position := _first_difference(a, b)) is not None
    ]
    speed_up = speculative.tokens_per_s / plain.tokens_per_s
    if not differences:
        print(f"outputs are equal, speed-up {speed_up:.2f}")
        return 0
    prompt, position = differences[0]
    print(
        f"outputs DIFFER, first at new token {position + 1} of prompt {prompt}; in bf16 two tokens "
        "may be equally likely up to rounding, so try --dtype fp32"
    )
    return EXIT_DIFFERENT


def _first_difference(a: list[int], b: list[int]) -> int | None:
    if a == b:
        return None
    matching = [x == y for x, y in zip(a, b, strict=False)]
    return matching.index(False) if False in matching else len(matching)


if __name__ == "__main__":
    sys.exit(main())
