"""Command line: an HTTP server of an export, `python -m model.serve DIR`, like OpenAI's.

Texts of many clients are decoded as one batch that they join and leave; the heads draft for all.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from foundation.command_line import exit_status
from foundation.shown_text import printable
from model.errors import CheckpointError, ConfigError, is_memory_shortage
from model.hugging_face.config import first_token
from model.hugging_face.saved_folder import read_any_record
from model.joint_decoding.options import (
    JOINT_DECODERS,
    add_joint_options,
    check_drafts,
    check_rule,
)
from model.writing.draft_options import add_draft_options, check_draft_options
from model.writing.options import AUTO, HEADS_HELP, choose_number, heads_option

if TYPE_CHECKING:
    from model.decoding.chain import ChainDecoder
    from model.inference.loading import LoadedNetwork
    from model.inference.network import Network
    from model.serving.app import Served

KEY_VARIABLE = "HEADWAY_API_KEY"

_BODY_BYTES = 8 << 20
_SIZES = (1, 4, 16, 64, 256)  # of batches for which a number of heads is chosen
_MOST_ROWS = 1024
_MOST_POSITIONS = 1 << 20
_BEAMS = 8

EPILOG = f"""\
examples:
  PROG export
  PROG export --port 8080 --heads 3 --max-batch 32
  PROG export --draft smaller --drafts 4
  {KEY_VARIABLE}=secret PROG export --host 0.0.0.0

SIGTERM or Ctrl-C: texts that run are finished, within --grace seconds; new ones are refused.
exit status: 0 stopped by a signal, 1 the model or an option cannot be used (in one line), 2 wrong
arguments, 130 after Ctrl-C while the model was loaded
"""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m model.serve") -> int:
    """Run the command; give its exit status."""
    options = parse(arguments, prog)

    def serve() -> None:
        check(options)
        _serve(options)

    # Ctrl-C ends it so before requests are taken; later the server ends by itself.
    return exit_status(serve, CheckpointError, ConfigError)


def parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """The options of a command line; exits where they cannot be read."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Serve an exported model over HTTP, in the form of OpenAI's API.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="what python -m pipeline.export has written")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 = all (127.0.0.1)")
    add("--port", type=int, default=8000, help="0 = any free one (8000)")
    add("--name", metavar="NAME", help="of the model, for clients (name of the run)")
    add("--heads", type=heads_option, metavar="K", help=HEADS_HELP)
    add_draft_options(add)
    add("--decoder", choices=JOINT_DECODERS, help="mtad: lossy, by joint probability (exact)")
    add("--beam-width", type=int, metavar="W", help="beams of drafts of mtad")
    add_joint_options(add)
    add("--max-batch", type=int, default=16, metavar="B", help="texts that run at once (16)")
    add(
        "--max-beams",
        type=int,
        default=_BEAMS,
        metavar="W",
        help=f"beams of all texts whose requests ask for a decoder; 0 = none may ({_BEAMS})",
    )
    add("--queue", type=int, default=128, metavar="Q", help="texts that may wait for room (128)")
    add(
        "--max-model-len",
        type=int,
        metavar="N",
        help="tokens of a prompt and its continuation (as the model was trained on)",
    )
    add("--api-key", metavar="KEY", help=f"that clients must send (${KEY_VARIABLE}, else none)")
    add("--grace", type=float, default=30.0, metavar="S", help="seconds to finish texts in (30)")
    add("--dtype", choices=("fp32", "bf16"), help="arithmetic (as exported)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs (auto)")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """See that the values make sense; the key may come from the environment.

    Raises:
        ConfigError: naming the first option that does not.
    """
    limits = {
        "port": (0, 65535),
        "max_batch": (1, _MOST_ROWS),
        "max_beams": (0, _MOST_ROWS),
        "queue": (0, 1 << 20),
        "max_model_len": (2, _MOST_POSITIONS),
        "grace": (0, 86400),
    }
    for name, (least, most) in limits.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise ConfigError(
                f"--{name.replace('_', '-')} {printable(f'{value}')} must be from {least} to {most}"
            )
    check_draft_options(options, {"--heads": options.heads})
    check_rule(options, "--beam-width", "--tau", "--candidates")
    if options.decoder is not None and options.heads == AUTO:
        raise ConfigError(
            f"--heads auto measures exact drafts, so it does not go with --decoder "
            f"{options.decoder}; give a number, or leave --heads out"
        )
    key = options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE, "")
    if not (key.isascii() and key.isprintable()) or " " in key or options.api_key == "":
        raise ConfigError(
            f"--api-key or {KEY_VARIABLE} must be letters, digits and signs of ASCII without "
            "blanks, as it goes into a header; choose another key"
        )
    options.api_key = key


def used_heads(options: argparse.Namespace) -> int:
    """How many of the model's heads are in use: where a second model drafts, head 1 alone.

    Raises:
        ConfigError: there are not so many, or nothing drafts what `--decoder` keeps.
    """
    heads = choose_number(options.heads, read_any_record(options.directory).future_tokens)
    second_model = options.draft_model is not None
    check_drafts(options, heads, second_model=second_model)
    return 1 if second_model else heads


def _serve(options: argparse.Namespace) -> None:
    heads = used_heads(options)
    try:
        # Here, so that --help and mistakes do not wait for torch.
        from model.serving.running import Server, address, listen
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"model.serve needs {error.name}, which is not installed; pip install 'headway[serve]'"
        ) from error
    with listen(options.host, options.port) as listening:
        served, drafting = load(options, heads)
        where = f"serving {served.name} ({drafting}) at {address(listening)}/v1"
        server = Server(served, grace_s=options.grace, ready=lambda: print(where, flush=True))
        server.run_on(listening)
    print("stopped", flush=True)


@contextlib.contextmanager
def _memory_shortage_told(options: argparse.Namespace, positions: int) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_shortage(error):
            raise
        raise ConfigError(
            f"--max-batch {options.max_batch}, --max-beams {options.max_beams} and --max-model-len "
            f"{positions}: no memory for the keys and values of so many tokens; lower one of them"
        ) from error


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def load(options: argparse.Namespace, heads: int) -> "tuple[Served, str]":
    """Load what the options name; also what is said of who drafts."""
    from model.decoding.batch import Batch
    from model.decoding.head_choice import HeadChoice, automatic_heads
    from model.serving.app import Served
    from model.serving.bodies import Limits
    from model.serving.decoders import Decoders
    from model.serving.engine import Engine
    from model.serving.metrics import Metrics
    from model.serving.prompts import Prompts

    loaded, drafter, positions = _models(options)
    description = loaded.record.description
    begin = first_token(options.directory, description.model.vocab_size)
    prompts = Prompts(
        options.directory, loaded.tokenizer, description.model.vocab_size, begin, positions
    )

    sizes = [size for size in _SIZES if size < options.max_batch] + [options.max_batch]
    choice = HeadChoice(dict.fromkeys(sizes, heads))
    if options.heads == AUTO:
        choice = automatic_heads(options.directory, loaded.network, sizes, _note, joined=True)

    def new_batch() -> Batch:
        decoder = _decoder(options, loaded, choice.most, drafter)
        return Batch(
            decoder, options.max_batch, positions, lambda n: decoder.use_heads(choice.of(n))
        )

    metrics = Metrics()
    if drafter is not None:
        metrics.watch("draft_forwards_total", lambda: drafter.forwards)
    decoders = Decoders(
        loaded.network, heads, loaded.eos_ids, options.max_beams, drafter, options.drafts
    )
    with _memory_shortage_told(options, positions):
        engine = Engine(new_batch, options.queue, metrics, options.max_beams)
        decoders.see_room(positions)
    served = Served(
        name=options.name or description.run,
        tokenizer=loaded.tokenizer,
        eos_ids=loaded.eos_ids,
        prompts=prompts,
        engine=engine,
        decoders=decoders,
        metrics=metrics,
        limits=Limits(_BODY_BYTES, positions, options.max_batch),
        marks={"decoder": options.decoder, "lossy": True} if options.decoder else {},
        api_key=options.api_key,
    )
    drafting = choice.told() if drafter is None else f"draft model, {options.drafts} drafts"
    lossy = "" if options.decoder is None else ", joint decoding, lossy"
    return served, drafting + lossy


def _models(options: argparse.Namespace) -> "tuple[LoadedNetwork, Network | None, int]":
    """The model, a second one that drafts if there is one, and positions that a text may have."""
    from model.hugging_face.loading import DTYPES
    from model.inference.loading import choose_device, limit_threads, load_drafter, load_network

    device = choose_device(options.device)
    dtype = DTYPES[options.dtype] if options.dtype else None
    loaded = load_network(options.directory, dtype, device)
    limit_threads(loaded.network)
    trained = loaded.record.description.sequence_length
    positions = options.max_model_len or trained
    drafter = None
    if options.draft_model is not None:
        drafter = load_drafter(options.draft_model, loaded, min(positions, trained))
    if positions > trained:
        _note(
            f"note: --max-model-len {positions} passes position {trained}, the last one the model "
            "was trained on; texts may get worse from there"
        )
    return loaded, drafter, positions


def _decoder(
    options: argparse.Namespace,
    loaded: "LoadedNetwork",
    heads: int,
    drafter: "Network | None",
) -> "ChainDecoder":
    """What decodes the batch."""
    from model.decoding.chain import ChainDecoder
    from model.decoding.draft_model import DraftModelDecoder
    from model.joint_decoding.command import joint_decoder

    network, drafts = loaded.network, options.drafts
    if options.decoder is not None:
        return joint_decoder(
            options,
            network,
            heads=heads,
            drafter=drafter,
            drafts=drafts,
            eos_ids=loaded.eos_ids,
        )
    if drafter is not None:
        return DraftModelDecoder(network, drafter=drafter, drafts=drafts)
    return ChainDecoder(network, heads=heads)


if __name__ == "__main__":
    sys.exit(main())
