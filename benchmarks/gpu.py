"""Everything that one GPU can show, in at most ten minutes; see `benchmarks/gpu.sh`.

Pieces run in the order of their worth, each in processes of its own. What a piece has found is
written at once to results/gpu-cuda/PIECE.json and is not measured again by the next call with the
same sources on the same machine, so that a call that was cut off goes on. The tables come from
what is there.
"""

import argparse
import contextlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.gpu_pieces import LEAST_S, PIECES, Budget
from benchmarks.gpu_processes import ROOT, Found, call, end_on_signals
from benchmarks.gpu_store import Store, alone_in, write_tables
from benchmarks.gpu_tables import tables
from benchmarks.tables import hardware, versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status: 1 when something that ran has failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    budget = Budget(60 * options.minutes - options.spent)
    is_final = options.device == "cuda" and not options.tiny
    readme = options.output / "README.md"
    if is_final and readme.exists() and "<!-- gpu begin -->" not in readme.read_text("utf-8"):
        parser.error(f"{readme} has no line <!-- gpu begin --> that says where tables go")
    folder = options.output / "results" / f"gpu-{options.device}{'-tiny' * options.tiny}"
    end_on_signals()
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(alone_in(folder))
        except BlockingIOError:
            parser.error(f"another call measures into {folder}; wait until it ends")
        except OSError as error:
            why = f"{folder} cannot be written to ({error.strerror})"
            parser.error(f"{why}; --output DIR names another place")
        if options.tables:
            store, is_good = Store(folder, ""), True
            print(tables({name: store.read(name) for name in PIECES}))
        else:
            store = Store(folder, f"{_device(options.device, parser)}; {versions()}")
            is_good = _run(options, budget, store)
        if is_final:
            try:
                write_tables(readme, tables({name: store.read(name) for name in PIECES}))
            except OSError as error:
                print(f"gpu.sh: {readme} cannot be written ({error.strerror})", file=sys.stderr)
                is_good = False
    return 0 if is_good else 1


def _run(options: argparse.Namespace, budget: Budget, store: Store) -> bool:
    """Run the pieces that are wanted; give whether all that is known of them is good."""
    is_good = True
    for name in options.only or PIECES:
        is_good &= _measure(name, options, budget, store)
    current = {name: store.current(name) for name in PIECES}
    print(tables(current))
    return is_good and not any(found.get("failures") for found in current.values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, prog="gpu.sh")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to try the script")
    parser.add_argument("--minutes", type=_minutes, default=9.5, help="of the whole call")
    parser.add_argument(
        "--only", nargs="+", choices=PIECES, metavar="PIECE", help=f"of {', '.join(PIECES)}"
    )
    parser.add_argument(
        "--again", action="store_true", help="also what has failed in an earlier call"
    )
    parser.add_argument(
        "--tables",
        action="store_true",
        help="measure nothing: write the tables of the results that are there, of whatever commit",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", metavar="DIR")
    parser.add_argument("--spent", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 <= minutes <= 1000:
        raise ValueError
    return minutes


def _device(device: str, parser: argparse.ArgumentParser) -> str:
    """Its name. A process of its own asks, since who asks keeps some of a GPU's memory."""
    if device == "cpu":
        return hardware("cpu")
    ask = (
        "import torch; torch.cuda.init(); free, total = torch.cuda.mem_get_info(); "
        "print(torch.cuda.get_device_name(), (total - free) / 2**30, sep='\\n')"
    )
    done = call([sys.executable, "-W", "ignore", "-c", ask], 120)
    if done.code != 0:
        said = (done.errors.strip().splitlines() or ["no answer"])[-1]
        parser.error(f"torch finds no GPU ({said}); --device cpu --tiny tries the script")
    name, used = done.output.splitlines()[-2:]
    if float(used) > 2:
        print(
            f"gpu.sh: other processes hold {float(used):.0f} GiB of the GPU; what they do changes "
            "times, and points may find no room",
            file=sys.stderr,
            flush=True,
        )
    return name


def _measure(name: str, options: argparse.Namespace, budget: Budget, store: Store) -> bool:
    """Run a piece, unless it was run; give whether it could run and be written."""
    size = "tiny" if options.tiny else "1b"
    found = store.current(name)
    has_failed = bool(found.get("failures") or found.get("failed"))
    if found.get("complete") and not (options.again and has_failed):
        failed = ", and failed; --again measures that again" if has_failed else ""
        print(f"{name}: measured before{failed}", flush=True)
        return True
    if budget.left_s() < LEAST_S:
        print(f"{name}: no time is left; call again to go on", flush=True)
        return True
    if options.again:
        found = _without_failures(found)
    started = time.monotonic()
    try:
        PIECES[name](options.device, size, budget, found, lambda told: store.write(name, told))
    except OSError as error:
        print(f"gpu.sh: {name}: {error}", file=sys.stderr, flush=True)
        return False
    except Exception:
        traceback.print_exc()  # the other pieces may do better
        return False
    print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return True


def _without_failures(found: Found) -> Found:
    kept = {name: row for name, row in found.get("rows", {}).items() if "error" not in row}
    return found | {"rows": kept, "failed": {}}


if __name__ == "__main__":
    sys.exit(main())
