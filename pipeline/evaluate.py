"""Command line: what a model is worth, `python -m pipeline.evaluate DIR --data SHARDS`.

Held-out loss and bits per byte of every head, tokens per forward, problems that its code solves,
and tasks of lm-evaluation-harness.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from data_prep.errors import DataError
from foundation.command_line import exit_status
from model.errors import CheckpointError, ConfigError
from pipeline.evaluating.options import check, ks_of, parse, workers_of

if TYPE_CHECKING:
    from pipeline.evaluating.model_folder import EvaluatedModel
    from pipeline.evaluating.pass_at_k import Sample
    from pipeline.evaluating.problems import Problem
    from pipeline.evaluating.texts import TextKind
    from pipeline.sandbox.run import Sandbox


Figures = dict[str, Any]


def main(arguments: Sequence[str] | None = None, prog: str = "python -m pipeline.evaluate") -> int:
    """Run the command; give its exit status."""
    options = parse(arguments, prog)

    def run() -> None:
        figures = evaluate(options, print)
        if options.json is not None:
            from pipeline.evaluating.results import write_json

            write_json(options.json, figures)

    return exit_status(run, CheckpointError, ConfigError, DataError)


def evaluate(options: argparse.Namespace, report: Callable[[str], None]) -> Figures:
    """Do what the options ask for; what can be refused is looked at before anything runs.

    Args:
        options: of the command line.
        report: told what was found, line by line.

    Returns:
        All figures, by part.

    Raises:
        CheckpointError: the model is none, or damaged.
        ConfigError: an option or a file cannot be used.
        DataError: the shards cannot be read.
    """
    check(options)
    # Imported here and below so that --help and mistakes do not wait for torch.
    from pipeline.evaluating.harness import check_installed
    from pipeline.evaluating.model_folder import open_model
    from pipeline.evaluating.problems import read_problems

    if options.lm_eval:
        check_installed()
    problems = read_problems(options.problems, options.shots) if options.problems else []
    sandbox = _sandbox(options) if problems else None
    figures: Figures = {"model": str(options.directory)}
    if options.data or options.text or problems:
        from model.inference.loading import choose_device

        model = open_model(options.directory, options.dtype, choose_device(options.device))
        if options.data or options.text:
            figures |= _held_out(model, options, report)
        if sandbox is not None:
            figures["pass_at_k"] = _solve(model, problems, sandbox, options, report)
    if options.lm_eval:
        figures["lm_eval"] = _harness(options, report)
    return figures


def _held_out(
    model: "EvaluatedModel", options: argparse.Namespace, report: Callable[[str], None]
) -> Figures:
    from model.inference.loading import limit_threads
    from pipeline.evaluating.decoding import Decoded, Prompting, decode
    from pipeline.evaluating.held_out import Windows, measure
    from pipeline.evaluating.results import held_out_tables

    window = options.window or model.window
    stride = options.stride or window
    if stride > window:
        raise ConfigError(
            f"--stride {stride} is more than the window of {window} tokens, so text between "
            "windows would be left out; give a smaller stride"
        )
    joined = model.joined if options.documents == "auto" else options.documents == "joined"
    kinds = _kinds(model, options, joined)
    by_kind, total = measure(model, kinds, Windows(window, stride, options.max_tokens))
    decoded: dict[str, Decoded] = {}
    drafts = model.network.num_heads > 1 and model.network.config.memory is None
    if options.prompts and drafts:
        limit_threads(model.network)
        prompting = Prompting(options.prompts, options.prompt_tokens, options.new_tokens)
        decoded = decode(model, kinds, prompting)
    documents = "joined" if joined else "apart"
    report(
        f"{options.directory}: heads {model.network.num_heads}, windows of {window:,} tokens every "
        f"{stride:,}, documents {documents}"
    )
    for line in held_out_tables(by_kind, total, decoded):
        report(line)
    return {
        "held_out": {
            "window": window,
            "stride": stride,
            "documents": documents,
            "kinds": by_kind,
            "all": total,
        },
        "decoding": decoded,
    }


def _kinds(model: "EvaluatedModel", options: argparse.Namespace, joined: bool) -> "list[TextKind]":
    """The texts of shards and files."""
    from pipeline.evaluating.texts import of_files, of_shards

    kinds = []
    if options.data:
        kinds += of_shards(
            model, options.data, options.split, joined=joined, max_tokens=options.max_tokens
        )
    if options.text:
        kinds += of_files(
            model,
            options.text,
            joined=joined,
            text_key=options.text_key,
            kind_key=options.kind_key,
        )
    names = [kind.name for kind in kinds]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"the kind of text {twice[0]} is in --data and in --text; evaluate one after the other"
        )
    if not any(len(stream) > 1 for kind in kinds for stream in kind.streams):
        raise ConfigError(
            "the text has no token with another one after it, so nothing can be predicted; give "
            "more text"
        )
    return kinds


def _sandbox(options: argparse.Namespace) -> "Sandbox":
    """Where programs run: locked up, or as the user allows."""
    from pipeline.sandbox.run import Limits, open_sandbox

    limits = Limits(options.time_limit, options.memory_mib << 20)
    sandbox = open_sandbox(limits, allow_unconfined=options.allow_unsandboxed)
    if not sandbox.confined:
        print("warning: generated code runs with all that your account may do", file=sys.stderr)
    return sandbox


def _solve(
    model: "EvaluatedModel",
    problems: "list[Problem]",
    sandbox: "Sandbox",
    options: argparse.Namespace,
    report: Callable[[str], None],
) -> Figures:
    from model.decoding.sampling import Sampling
    from model.inference.loading import limit_threads
    from pipeline.evaluating.completions import Drawing
    from pipeline.evaluating.pass_at_k import mean_pass_at_k, solve
    from pipeline.evaluating.results import pass_table, sample_file

    available = model.network.num_heads
    if model.network.config.memory is not None and options.heads:
        raise ConfigError(
            f"--heads {options.heads} is of drafts, and a model with a memory decodes without "
            "them; leave --heads out"
        )
    heads = options.heads or available
    if heads > available:
        raise ConfigError(f"--heads {heads}, but this model has {available}; use 1 to {available}")
    greedy = options.temperature == 0
    drawing = Drawing(
        samples=options.samples,
        heads=heads,
        sampling=Sampling(options.temperature, top_p=1.0 if greedy else options.top_p),
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )
    limit_threads(model.network)
    samples: list[Sample] = []
    solved = solve(model, problems, drawing, sandbox, workers_of(options))
    with sample_file(options.results) as write:
        for done, found in enumerate(solved, 1):
            samples += found
            write(found)
            if sys.stderr.isatty():
                end = "\n" if done == len(problems) else ""
                line = f"\r{done} of {len(problems)} problems"
                print(line, end=end, file=sys.stderr, flush=True)
    means = mean_pass_at_k(samples, ks_of(options))
    for line in pass_table(means, samples):
        report(line)
    return {
        "problems": len(problems),
        "shots": options.shots,
        "samples": options.samples,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
        "sandboxed": sandbox.confined,
        "estimates": means,
    }


def _harness(options: argparse.Namespace, report: Callable[[str], None]) -> Figures:
    from model.inference.loading import choose_device
    from pipeline.evaluating.harness import HarnessOptions, run_harness
    from pipeline.evaluating.results import harness_table

    found = run_harness(
        options.directory,
        HarnessOptions(
            tasks=[name.strip() for name in options.lm_eval.split(",")],
            include_path=options.include_path,
            limit=options.limit,
            batch_size=options.batch_size,
            dtype=options.dtype,
            device=str(choose_device(options.device)),
        ),
    )
    for line in harness_table(found):
        report(line)
    return found


if __name__ == "__main__":
    sys.exit(main())
