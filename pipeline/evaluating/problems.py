"""Programming problems in the formats of HumanEval and of MBPP.

    HumanEval   task_id, prompt, entry_point, test    (Chen et al. 2021)
    MBPP        task_id, text or prompt, test_list    (Austin et al. 2021); test_setup_code and
                                                      test_imports where they are there

A problem of HumanEval is the beginning of a function, which the model continues. Of MBPP, the
prompt is a docstring with the task and its tests, as in Fried et al. 2022, and the model writes
what follows it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from foundation.json_lines import read_json_lines
from foundation.shown_text import printable, reason
from model.errors import ConfigError

Format = Literal["HumanEval", "MBPP"]

# Where a completion has left the function, or begins to test itself.
_STOPS: dict[Format, tuple[str, ...]] = {
    "HumanEval": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    "MBPP": ("\nclass", "\nassert", '\n"""', "\nprint", "\nif"),
}


class Problem(NamedTuple):
    """A problem.

    Attributes:
        task_id: its name.
        form: the format it came in.
        prompt: what the model continues.
        before: what stands before the completion in the program that is run.
        after: the checks, which stand behind it.
    """

    task_id: str
    form: Format
    prompt: str
    before: str
    after: str

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings at which a completion ends; none of them belongs to it."""
        return _STOPS[self.form]

    def program(self, completion: str) -> str:
        """The program whose end shows that a completion is right."""
        return f"{self.before}{completion}\n{self.after}\n"


def read_problems(path: Path) -> list[Problem]:
    """The problems of a file of JSON lines, compressed or not.

    Raises:
        ConfigError: it cannot be read, or is not of either format; names the line and the key.
    """
    problems: dict[str, Problem] = {}
    try:
        for line in read_json_lines(path):
            problem = _problem(line.value, line.number)
            if problem.task_id in problems:
                raise ValueError(f"line {line.number} has the task_id {problem.task_id!r} again")
            problems[problem.task_id] = problem
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--problems {path}: {reason(error)}; give JSON lines of HumanEval (task_id, prompt, "
            "entry_point, test) or of MBPP (task_id, text or prompt, test_list)"
        ) from error
    if not problems:
        raise ConfigError(f"--problems {path} holds no problem; give a file with some")
    return list(problems.values())


def _problem(value: dict[str, Any], number: int) -> Problem:
    if "test_list" in value:
        return _of_mbpp(value, number)
    if "test" in value or "entry_point" in value:
        return _of_human_eval(value, number)
    raise ValueError(f"line {number} has neither the key 'test' nor 'test_list'")


def _of_human_eval(value: dict[str, Any], number: int) -> Problem:
    prompt = _text(value, "prompt", number)
    entry, test = _text(value, "entry_point", number), _text(value, "test", number)
    if not entry.isidentifier():
        raise ValueError(f"line {number}: 'entry_point' is no name of a function")
    return Problem(
        task_id=_task_id(value, number),
        form="HumanEval",
        prompt=prompt,
        before=prompt,
        after=f"{test}\ncheck({entry})",
    )


def _of_mbpp(value: dict[str, Any], number: int) -> Problem:
    task = _text(value, "text" if "text" in value else "prompt", number)
    tests = _texts(value, "test_list", number)
    if not tests:
        raise ValueError(f"line {number}: 'test_list' is empty")
    setup = [_text(value, "test_setup_code", number)] if value.get("test_setup_code") else []
    imports = _texts(value, "test_imports", number) if value.get("test_imports") else []
    shown = "\n".join(tests)
    return Problem(
        task_id=_task_id(value, number),
        form="MBPP",
        prompt=f'"""\n{task}\n{shown}\n"""\n',
        before="",
        after="\n".join([*setup, *imports, *tests]),
    )


def _task_id(value: dict[str, Any], number: int) -> str:
    found = value.get("task_id")
    if type(found) not in (str, int):
        raise ValueError(f"line {number}: 'task_id' is no text or number")
    return printable(str(found))


def _text(value: dict[str, Any], key: str, number: int) -> str:
    found = value.get(key)
    if not isinstance(found, str):
        raise ValueError(f"line {number} has no text under {key!r}")
    return found


def _texts(value: dict[str, Any], key: str, number: int) -> Sequence[str]:
    found = value.get(key)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"line {number} has no list of texts under {key!r}")
    return found
