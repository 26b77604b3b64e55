"""Runs one program and says whether it came to its end; the innermost process of a sandbox.

Its text is given to `python -I -S -c`, with a call of `main` behind it: no file of ours can be seen
from inside. So it imports the standard library alone.
"""

import json
import os
from collections.abc import Callable

VERDICT = 3  # the descriptor that the verdict is written to
_LONGEST_REASON = 200


def main() -> None:
    """Read a program and a token from standard input; write the token once the program is through.

    The program can find what this function holds, if it looks for it: see `pipeline.sandbox.run`.
    """
    # Bound before the program runs, which may replace what the modules hold.
    write, end, dumps = os.write, os._exit, json.dumps
    with open(0, "rb") as given:
        job = json.load(given)
    os.open(os.devnull, os.O_RDONLY)  # takes the place of standard input
    namespace = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        exec(compile(job["program"], "program.py", "exec"), namespace)
    except BaseException as error:  # SystemExit and KeyboardInterrupt end the program, too
        verdict = {"failed": _reason(error, str)}
    else:
        verdict = {"token": job["token"]}
    write(VERDICT, dumps(verdict).encode())
    end(0)  # does not wait for threads that the program has left


def _reason(error: BaseException, text_of: Callable[[object], str]) -> str:
    """What the program raised; its own classes may raise again when they are asked."""
    try:
        text = text_of(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}"[:_LONGEST_REASON]
