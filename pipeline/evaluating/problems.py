"""Programming problems in the formats of HumanEval and of MBPP.

    HumanEval   task_id, prompt, entry_point, test    (Chen et al. 2021)
    MBPP        task_id, text or prompt, test_list    (Austin et al. 2021); test_setup_code and
                                                      test_imports where they are there

A problem of HumanEval is the beginning of a function, which the model continues. Of MBPP, the
prompt is a docstring with the task and its tests, as in Fried et al. 2022, and the model writes
what follows it; or, with examples, the form of Austin et al. 2021.
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
_STOP_OF_EXAMPLES = ("[DONE]",)
# The examples of Austin et al. 2021 are tasks 2 to 4 of the set, from its part for prompts.
_FIRST_EXAMPLE = 2


class Problem(NamedTuple):
    """A problem.

    Attributes:
        task_id: its name.
        form: the format it came in.
        prompt: what the model continues.
        before: what stands before the completion in the program that is run.
        after: the checks, which stand behind it.
        stops: strings at which a completion ends; none of them belongs to it.
    """

    task_id: str
    form: Format
    prompt: str
    before: str
    after: str
    stops: tuple[str, ...]

    def program(self, completion: str) -> str:
        """The program whose end shows that a completion is right."""
        return f"{self.before}{completion}\n{self.after}\n"


def read_problems(path: Path, shots: int = 0) -> list[Problem]:
    """The problems of a file of JSON lines, compressed or not.

    Args:
        path: the file.
        shots: solved tasks that stand before each of MBPP: its tasks 2, 3, .., which are no
            problems then. 3 is the set's usual form.

    Raises:
        ConfigError: it cannot be read, is not of either format, or lacks the tasks for examples;
            names the line and the key.
    """
    problems: dict[str, Problem] = {}
    examples: dict[int, str] = {}
    wanted = range(_FIRST_EXAMPLE, _FIRST_EXAMPLE + shots)
    try:
        for line in read_json_lines(path):
            if line.value.get("task_id") in wanted:
                solved = _text(line.value, "code", line.number)
                examples[line.value["task_id"]] = (
                    f"{_asked(line.value, line.number)}{solved}\n[DONE]\n\n"
                )
                continue
            problem = _problem(line.value, line.number, shots > 0)
            if problem.task_id in problems:
                raise ValueError(f"line {line.number} has the task_id {problem.task_id!r} again")
            problems[problem.task_id] = problem
        if lacking := [number for number in wanted if number not in examples]:
            raise ValueError(f"--shots {shots} takes task {lacking[0]} of MBPP, which is not there")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--problems {path}: {reason(error)}; give JSON lines of HumanEval (task_id, prompt, "
            "entry_point, test) or of MBPP (task_id, text or prompt, test_list)"
        ) from error
    if not problems:
        raise ConfigError(f"--problems {path} holds no problem; give a file with some")
    before = "".join(examples[number] for number in wanted)
    return [
        problem._replace(prompt=before + problem.prompt) if before else problem
        for problem in problems.values()
    ]


def _problem(value: dict[str, Any], number: int, with_examples: bool) -> Problem:
    if "test_list" in value:
        return _of_mbpp(value, number, with_examples)
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
        stops=_STOPS["HumanEval"],
    )


def _of_mbpp(value: dict[str, Any], number: int, with_examples: bool) -> Problem:
    tests = _texts(value, "test_list", number)
    if not tests:
        raise ValueError(f"line {number}: 'test_list' is empty")
    setup = [_text(value, "test_setup_code", number)] if value.get("test_setup_code") else []
    imports = _texts(value, "test_imports", number) if value.get("test_imports") else []
    shown = "\n".join(tests)
    described = f'"""\n{_task(value, number)}\n{shown}\n"""\n'
    return Problem(
        task_id=_task_id(value, number),
        form="MBPP",
        prompt=_asked(value, number) if with_examples else described,
        before="",
        after="\n".join([*setup, *imports, *tests]),
        stops=_STOP_OF_EXAMPLES if with_examples else _STOPS["MBPP"],
    )


def _asked(value: dict[str, Any], number: int) -> str:
    """A task of MBPP in the words of Austin et al. 2021, up to where its code begins."""
    shown = "\n".join(_texts(value, "test_list", number))
    return (
        f"You are an expert Python programmer, and here is your task: {_task(value, number)} "
        f"Your code should pass these tests:\n\n{shown}\n[BEGIN]\n"
    )


def _task(value: dict[str, Any], number: int) -> str:
    return _text(value, "text" if "text" in value else "prompt", number)


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
