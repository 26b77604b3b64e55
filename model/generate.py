"""Command line: text from an export, `python -m model.generate DIR --prompt TEXT`.

The heads draft, head 1 verifies: at temperature 0 the text is the one head 1 gives alone.
"""

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from foundation.command_line import exit_status
from model.beams.options import BEAM_DECODERS, check_drafting
from model.errors import CheckpointError, ConfigError, is_memory_shortage
from model.hugging_face.config import first_token
from model.hugging_face.saved_folder import read_any_record
from model.joint_decoding.options import JOINT_DECODERS, check_drafts
from model.writing.options import (
    AUTO,
    check,
    check_memory,
    check_stream,
    choose_number,
    lossy_top_k,
    parse,
    read_prompt,
)
from model.writing.prompts import encode_prompts
from model.writing.timed_run import Run, print_comparison

if TYPE_CHECKING:
    from model.beams.command import BeamRun
    from model.decoding.batch import Piece
    from model.decoding.chain import ChainDecoder
    from model.decoding.head_choice import Drafting
    from model.decoding.sampling import Sampling
    from model.decoding.stopping import StopStrings
    from model.early_exit.network import EarlyExitNetwork
    from model.inference.loading import LoadedNetwork
    from model.inference.network import Network


_COMPARE_ROUNDS = 2


def main(arguments: Sequence[str] | None = None, prog: str = "python -m model.generate") -> int:
    """Run the command; give its exit status."""
    options = parse(arguments, prog)
    return exit_status(lambda: _generate(options), CheckpointError, ConfigError)


def _generate(options: argparse.Namespace) -> int:
    check(options)
    if options.prompt_file is not None:
        options.prompt.append(read_prompt(options.prompt_file))
    check_stream(options)
    record = read_any_record(options.directory)
    heads = choose_number(options.heads, record.future_tokens)
    has_memory = record.description.model.memory is not None
    check_memory(options, has_memory=has_memory)
    check_drafting(options, record.future_tokens)
    check_drafts(options, heads, second_model=options.draft_model is not None)
    # Imported here so that --help and mistakes do not wait for torch.
    from model.decoding.head_choice import Drafting
    from model.hugging_face.loading import DTYPES
    from model.inference.loading import choose_device, limit_threads, load_drafter, load_network

    device = choose_device(options.device)
    dtype = DTYPES[options.dtype] if options.dtype else None
    loaded = load_network(options.directory, dtype, device, memory=True)
    model = loaded.record.description.model
    begin = first_token(options.directory, model.vocab_size)
    prompts = encode_prompts(options.prompt, options.max_new_tokens, loaded, begin)
    drafter = load_drafter(options.draft_model, loaded) if options.draft_model else None
    if options.decoder in BEAM_DECODERS:
        return _generate_beams(options, loaded, prompts, drafter)
    limit_threads(loaded.network)
    drafting = Drafting(1 if has_memory else heads, options.tree)
    if options.heads == AUTO and not has_memory:
        drafting = _automatic(options, loaded.network, len(prompts))
    ways = [_Way(*drafting, drafter, _early_exit(options, loaded))]
    if options.compare:
        ways.insert(0, _Way(1, 0, None, None))
    # The first run on a machine pays for what is set up once; the faster of two is reported.
    rounds = [
        [_run(loaded, prompts, way, options) for way in ways]
        for _ in range(_COMPARE_ROUNDS if options.compare else 1)
    ]
    runs = [min(times, key=lambda run: run.seconds) for times in zip(*rounds, strict=True)]
    _print_texts(options, loaded, prompts, runs[-1].generation.tokens)
    for run in runs:
        _tell(run, options)
    return print_comparison(*runs) if options.compare else 0


def _generate_beams(
    options: argparse.Namespace,
    loaded: "LoadedNetwork",
    prompts: list[list[int]],
    drafter: "Network | None",
) -> int:
    from model.beams.command import run_beams
    from model.inference.loading import limit_threads

    limit_threads(loaded.network)
    with _memory_shortage_told(options):
        run = run_beams(
            options,
            loaded.network,
            prompts,
            sampling=_sampling(options),
            eos_ids=loaded.eos_ids,
            stop=_stop(options, loaded),
            seeds=_seeds(options, len(prompts)),
            drafter=drafter,
        )
    _print_texts(options, loaded, prompts, run.generation.tokens)
    _tell(run, options)
    return 0


def _tell(run: "Run | BeamRun", options: argparse.Namespace) -> None:
    print(run.summary())
    if options.stats:
        print(*(f"  {line}" for line in run.statistics()), sep="\n")


def _seeds(options: argparse.Namespace, rows: int) -> list[int]:
    return [(options.seed + row) % (1 << 63) for row in range(rows)]


@contextlib.contextmanager
def _memory_shortage_told(options: argparse.Namespace) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_shortage(error):
            raise
        raise ConfigError(
            f"--max-new-tokens {options.max_new_tokens}: no memory for the keys and values of so "
            "many tokens; give a smaller number, or fewer prompts"
        ) from error


def _automatic(options: argparse.Namespace, network: "Network", rows: int) -> "Drafting":
    """What pays here: heads for what the other options ask for, or a chain or tree of them."""
    from model.decoding.head_choice import Drafting, automatic_drafting, automatic_heads

    if options.tree or options.lossy or options.temperature:
        heads = automatic_heads(options.directory, network, [rows], _note).most
        return Drafting(heads, options.tree)
    found = automatic_drafting(options.directory, network, rows, _note)
    if found.spread:
        _note(
            f"note: --heads auto drafts by a tree, as --heads {found.heads} --tree {found.spread}"
        )
    return found


def _early_exit(options: argparse.Namespace, loaded: "LoadedNetwork") -> "EarlyExitNetwork | None":
    from model.early_exit.loading import load_early_exit

    if options.early_exit is None:
        return None
    return load_early_exit(options.early_exit, options.directory, loaded.network)


class _Way(NamedTuple):
    """What drafts."""

    heads: int
    spread: int
    drafter: "Network | None"
    early_exit: "EarlyExitNetwork | None"

    def told(self, options: argparse.Namespace) -> str:
        """Its name in what is printed."""
        from model.joint_decoding.command import joint_name

        if options.decoder in JOINT_DECODERS:
            return joint_name(options, self.drafter, self.heads)
        if self.drafter is not None:
            return f"draft model, {options.drafts} drafts"
        if self.early_exit is not None:
            return f"early exit at layer {self.early_exit.layer}, 1 to {options.exit_steps} drafts"
        return f"{self.heads} {'head' if self.heads == 1 else 'heads'}"

    def most_drafts(self, options: argparse.Namespace) -> int:
        """Tokens that it drafts for each forward, at most."""
        if self.drafter is not None:
            return int(options.drafts)
        return self.heads - 1 if self.early_exit is None else int(options.exit_steps)


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def _sampling(options: argparse.Namespace) -> "Sampling":
    from model.decoding.sampling import Sampling

    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
    )


def _stop(options: argparse.Namespace, loaded: "LoadedNetwork") -> "StopStrings | None":
    from model.decoding.stopping import StopStrings

    return StopStrings(loaded.tokenizer, options.stop) if options.stop else None


def _decoder(
    loaded: "LoadedNetwork", way: _Way, options: argparse.Namespace, seeds: list[int]
) -> "ChainDecoder":
    from model.decoding.chain import ChainDecoder
    from model.decoding.draft_model import DraftModelDecoder
    from model.decoding.lossy import LossyDecoder, LossyRule
    from model.decoding.tree import TreeDecoder
    from model.early_exit.decoder import EarlyExitDecoder
    from model.joint_decoding.command import joint_decoder

    network, heads = loaded.network, way.heads
    logprobs, sampling = options.stats, _sampling(options)
    if options.decoder in JOINT_DECODERS:
        return joint_decoder(
            options,
            network,
            heads=heads,
            drafter=way.drafter,
            drafts=options.drafts,
            sampling=sampling,
            eos_ids=loaded.eos_ids,
            seeds=seeds,
            logprobs=logprobs,
        )
    if way.drafter is not None:
        return DraftModelDecoder(
            network,
            drafter=way.drafter,
            drafts=options.drafts,
            sampling=sampling,
            seeds=seeds,
            logprobs=logprobs,
        )
    if way.early_exit is not None:
        return EarlyExitDecoder(
            way.early_exit,
            threshold=options.exit_threshold,
            most_drafts=options.exit_steps,
            sampling=sampling,
            seeds=seeds,
            logprobs=logprobs,
        )
    if way.spread:
        return TreeDecoder(
            network,
            heads=heads,
            spread=way.spread,
            sampling=sampling,
            seeds=seeds,
            logprobs=logprobs,
        )
    if options.lossy is None:
        return ChainDecoder(network, heads=heads, sampling=sampling, seeds=seeds, logprobs=logprobs)
    rule = LossyRule(top_k=lossy_top_k(options.lossy) or 0)
    return LossyDecoder(
        network, heads=heads, rule=rule, sampling=sampling, seeds=seeds, logprobs=logprobs
    )


def _run(
    loaded: "LoadedNetwork", prompts: list[list[int]], way: _Way, options: argparse.Namespace
) -> Run:
    from model.decoding.generation import collect, stream
    from model.early_exit.decoder import EarlyExitDecoder
    from model.joint_decoding.command import joint_statistics
    from model.joint_decoding.decoder import JointDecoder

    seeds = _seeds(options, len(prompts))
    start = time.perf_counter()
    with _memory_shortage_told(options):
        decoder = None
        if loaded.network.config.memory is not None:
            pieces = _remembering(loaded, prompts, options, seeds)
        else:
            decoder = _decoder(loaded, way, options, seeds)
            pieces = stream(
                decoder,
                prompts,
                max_new_tokens=options.max_new_tokens,
                eos_id=loaded.eos_ids,
                stop=_stop(options, loaded),
            )
        first = next(pieces)
        first_s = time.perf_counter() - start
        pieces = itertools.chain([first], pieces)
        if options.stream:
            pieces = _shown(pieces, options, loaded, prompts[0])
        result = collect(pieces, len(prompts))
    seconds = time.perf_counter() - start
    tried, notes = None, []
    if isinstance(decoder, (EarlyExitDecoder, JointDecoder)):
        tried = decoder.tried
    if isinstance(decoder, JointDecoder):
        notes = joint_statistics(decoder, result.forwards)
    name, most_drafts = way.told(options), way.most_drafts(options)
    return Run(result, name, tried, most_drafts, seconds, first_s, notes)


def _remembering(
    loaded: "LoadedNetwork",
    prompts: list[list[int]],
    options: argparse.Namespace,
    seeds: list[int],
) -> Iterator["Piece"]:
    """The pieces of a model with a memory, which goes on from a file, or into one, if asked for."""
    from model.streaming.generation import continued
    from model.streaming.state_file import read_state, write_state

    config, load, save = loaded.network.config, options.load_memory, options.save_memory
    return continued(
        loaded.network,
        prompts,
        max_new_tokens=options.max_new_tokens,
        eos_id=loaded.eos_ids,
        stop=_stop(options, loaded),
        sampling=_sampling(options),
        seeds=seeds,
        state=None if load is None else read_state(load, config),
        finished=None if save is None else (lambda state: write_state(save, state, config)),
    )


def _shown(
    pieces: Iterator["Piece"],
    options: argparse.Namespace,
    loaded: "LoadedNetwork",
    prompt: list[int],
) -> Iterator["Piece"]:
    """Pass the pieces of one text on, printing each as soon as it is there."""
    from model.decoding.text_stream import TextStream

    text = TextStream(loaded.tokenizer, prompt, _stop(options, loaded))
    print(options.prompt[0], end="", flush=True)
    for piece in pieces:
        print(text.add([t for t in piece.tokens if t not in loaded.eos_ids]), end="", flush=True)
        yield piece
    print(text.finish())


def _print_texts(
    options: argparse.Namespace,
    loaded: "LoadedNetwork",
    prompts: list[list[int]],
    tokens: list[list[int]],
) -> None:
    stop = _stop(options, loaded)
    for text, prompt, new in zip(options.prompt, prompts, tokens, strict=True):
        # Decoded together, so that pieces of one character meet; the prompt stays as it was given.
        begin = loaded.tokenizer.decode(prompt, skip_special_tokens=True)
        kept = [token for token in new if token not in loaded.eos_ids]
        whole = loaded.tokenizer.decode(prompt + kept, skip_special_tokens=True)
        if not whole.startswith(begin):
            text = begin = ""
        continued = whole.removeprefix(begin)
        if not options.stream:
            print(text + (continued if stop is None else stop.cut(continued)))
        if options.ids:
            print("ids:", " ".join(map(str, new)))
        print("---")


if __name__ == "__main__":
    sys.exit(main())
