"""Problems of both formats, the estimator, and completions that are run."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.decoding.sampling import Sampling
from model.errors import ConfigError
from pipeline.evaluating.completions import Drawing, draw
from pipeline.evaluating.model_folder import EvaluatedModel, open_model
from pipeline.evaluating.pass_at_k import Sample, mean_pass_at_k, pass_at_k, solve
from pipeline.evaluating.problems import Problem, read_problems
from pipeline.evaluating.results import sample_file
from pipeline.sandbox.run import Limits, Sandbox, open_sandbox
from tests.support.tiny_export import export_tiny

HUMAN_EVAL: dict[str, Any] = {
    "task_id": "T/0",
    "prompt": 'def add(a, b):\n    """Sum of two numbers."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
MBPP: dict[str, Any] = {
    "task_id": 11,
    "text": "Write a function that adds.",
    "code": "def add(a, b):\n    return math.fsum([a, b])",
    "test_setup_code": "import math",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
}


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    """Locked up where the machine allows it."""
    return open_sandbox(Limits(60.0), allow_unconfined=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedModel:
    """A tiny model that writes bytes."""
    folder = tmp_path_factory.mktemp("model")
    export_tiny(folder / "export")
    return open_model(folder / "export", None, torch.device("cpu"))


def test_a_memory_writes_past_the_sequences_of_its_training(
    tmp_path: Path, model: EvaluatedModel
) -> None:
    """Where the prompt leaves another model no room; a completion depends on its seed alone."""
    export_tiny(tmp_path / "export", memory={"segment": 6})
    remembering = open_model(tmp_path / "export", None, torch.device("cpu"))
    problem = Problem("T/0", "HumanEval", "a" * 70, "", "", ("\nclass",))
    drawing = Drawing(3, 1, Sampling(1.0), max_new_tokens=9, seed=5)
    found = list(draw(remembering, problem, drawing))
    assert len(set(found)) == 3
    assert found[:2] == list(draw(remembering, problem, drawing._replace(samples=2)))
    assert remembering.positions < 70
    assert list(draw(model, problem, drawing)) == []


def _write(path: Path, *values: dict[str, Any]) -> Path:
    content = "".join(json.dumps(value) + "\n" for value in values).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_the_estimator_is_the_share_of_sets_with_a_right_one() -> None:
    """By enumeration of all sets of k completions."""
    for samples in range(1, 7):
        for passed in range(samples + 1):
            for k in range(1, samples + 1):
                sets = list(itertools.combinations(range(samples), k))
                right = sum(any(number < passed for number in one) for one in sets)
                assert pass_at_k(samples, passed, k) == pytest.approx(right / len(sets), abs=1e-12)


def test_the_mean_is_over_problems() -> None:
    """Each problem weighs the same."""
    samples = [Sample(task, "", passed, "") for task, passed in [("a", True), ("a", False)] * 2]
    samples += [Sample("b", "", False, "")] * 4
    assert mean_pass_at_k(samples, [1, 4]) == {1: 0.25, 4: 0.5}


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_both_formats_are_read_and_run(name: str, tmp_path: Path, sandbox: Sandbox) -> None:
    """The solution passes, nothing and a wrong one do not, and the prompt shows the tests."""
    human_eval, mbpp = read_problems(_write(tmp_path / name, HUMAN_EVAL, MBPP))
    assert (human_eval.form, mbpp.form, mbpp.task_id) == ("HumanEval", "MBPP", "11")
    assert human_eval.prompt == HUMAN_EVAL["prompt"]
    assert mbpp.prompt.startswith('"""\nWrite a function that adds.\nassert add(1, 2) == 3\n')
    for problem, right in ((human_eval, HUMAN_EVAL["canonical_solution"]), (mbpp, MBPP["code"])):
        assert sandbox.run(problem.program(right)) == (True, "passed")
        for wrong in ("", right.replace("b", "a"), "    import os; os._exit(0)"):
            assert not sandbox.run(problem.program(wrong)).passed


def test_the_sanitized_form_of_mbpp_is_read(tmp_path: Path, sandbox: Sandbox) -> None:
    """With `prompt` and `test_imports`."""
    value: dict[str, Any] = {
        "task_id": 2,
        "prompt": "Square.",
        "code": "def f(x):\n    return x * x",
        "test_imports": ["import math"],
        "test_list": ["assert f(2) == math.pow(2, 2)"],
    }
    (problem,) = read_problems(_write(tmp_path / "p.jsonl", value))
    assert sandbox.run(problem.program(value["code"])).passed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": None}, "line 2 has no text under 'test'"),
        ({"prompt": 3}, "line 2 has no text under 'prompt'"),
        ({"entry_point": "os.system"}, "line 2: 'entry_point' is no name"),
        ({"task_id": None}, "line 2: 'task_id'"),
        ({"task_id": "T/0"}, "line 2 has the task_id 'T/0' again"),
        ({"test_list": "assert"}, "line 2 has no text under 'text'|no list of texts"),
        ({"test_list": [], "text": ""}, "line 2: 'test_list' is empty"),
        ({"test_list": [1], "text": ""}, "line 2 has no list of texts under 'test_list'"),
    ],
)
def test_malformed_problems_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """By their line and key."""
    path = _write(tmp_path / "p.jsonl", HUMAN_EVAL, HUMAN_EVAL | {"task_id": "T/1"} | change)
    with pytest.raises(ConfigError, match=message):
        read_problems(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no problem"),
        (b"{}\n", "line 1 has neither the key 'test' nor 'test_list'"),
        (b'{"a": \n', "line 1 is not JSON"),
        (b"\x1f\x8b\x08", "line 1 is not JSON"),
    ],
)
def test_files_without_problems_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    """With what a file should hold."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_problems(path)


def test_damaged_compression_is_named(tmp_path: Path) -> None:
    """Cut short, or damaged in the middle."""
    path = _write(tmp_path / "p.jsonl.gz", HUMAN_EVAL)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"cut short|damaged"):
        read_problems(path)


def _drawing(samples: int, **changes: Any) -> Drawing:
    options: dict[str, Any] = {
        "heads": 4,
        "sampling": Sampling(1.0),
        "max_new_tokens": 12,
        "seed": 3,
    }
    return Drawing(samples=samples, **options | changes)


def test_completions_depend_on_seed_problem_and_number_alone(
    model: EvaluatedModel, tmp_path: Path
) -> None:
    """Not on how many there are, or on what was drawn before."""
    problems = read_problems(_write(tmp_path / "p.jsonl", HUMAN_EVAL, MBPP))
    short = [p._replace(prompt="def") for p in problems]  # the model has 64 positions
    few = [list(draw(model, problem, _drawing(2))) for problem in short]
    many = [list(draw(model, problem, _drawing(5))) for problem in reversed(short)]
    assert [found[:2] for found in reversed(many)] == few
    assert few[0] != few[1]
    assert len(set(many[0])) == 5
    assert list(draw(model, short[0], _drawing(2, seed=4))) != few[0]


def test_completions_end_at_stop_strings(model: EvaluatedModel) -> None:
    """Whatever follows one is cut off, and the string, too."""
    problem = Problem("t", "HumanEval", "x", "x", "", ("\0",))
    whole = next(draw(model, problem, _drawing(1, sampling=Sampling(), max_new_tokens=40)))
    stop = whole[7:10]
    assert len(stop) == 3

    stopped = problem._replace(stops=(stop,))
    cut = next(draw(model, stopped, _drawing(1, sampling=Sampling(), max_new_tokens=40)))
    assert cut == whole[: whole.index(stop)]


def test_solving_runs_every_completion(model: EvaluatedModel, sandbox: Sandbox) -> None:
    """In order; what passes is what its own program says."""
    always = Problem("always", "HumanEval", "#", "#", "pass", ("\0",))
    never = Problem("never", "HumanEval", "#", "#", "assert False", ("\0",))
    long = Problem("long", "HumanEval", "#" * 64, "#" * 64, "pass", ("\0",))
    found = list(solve(model, [always, never, long], _drawing(3), sandbox, workers=2))
    assert [[sample.task_id for sample in part] for part in found] == [
        ["always"] * 3,
        ["never"] * 3,
        ["long"] * 3,
    ]
    for sample in found[0]:
        assert sample.passed == sandbox.run(always.program(sample.completion)).passed
    assert not any(sample.passed for sample in found[1] + found[2])
    assert "its prompt is as long" in found[2][0].reason


def test_samples_are_on_the_disk_as_they_come(tmp_path: Path) -> None:
    """An evaluation that ends early leaves what was finished beside the older results."""
    path, partial = tmp_path / "s.jsonl", tmp_path / "s.jsonl.partial"
    path.write_text("older\n")
    one, other = Sample("T/0", "é", True, "passed"), Sample("T/1", "", False, "why")

    def killed() -> None:
        with sample_file(path) as write:
            write([one])
            assert [json.loads(line) for line in partial.read_text().splitlines()] == [
                one._asdict()
            ]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert path.read_text() == "older\n"
    assert partial.read_text().count("\n") == 1
    with sample_file(path) as write:
        write([one])
        write([other])
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == [one._asdict(), other._asdict()]
    assert not partial.exists()


def test_solved_tasks_stand_before_those_of_mbpp(tmp_path: Path) -> None:
    """Tasks 2 to 4, in their order, in the words of Austin et al. 2021; they are no problems."""
    path = tmp_path / "mbpp.jsonl"
    tasks = [MBPP | {"task_id": number, "text": f"Task {number}."} for number in (4, 2, 3, 1, 11)]
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    first, second = read_problems(path, shots=3)
    assert [first.task_id, second.task_id] == ["1", "11"]
    shown = "assert add(1, 2) == 3\nassert add(0, 0) == 0"
    asked = (
        "You are an expert Python programmer, and here is your task: Task {}. "
        f"Your code should pass these tests:\n\n{shown}\n[BEGIN]\n"
    )
    solved = f"{MBPP['code']}\n[DONE]\n\n"
    examples = "".join(asked.format(number) + solved for number in (2, 3, 4))
    assert second.prompt == examples + asked.format(11)
    assert second.stops == ("[DONE]",)
    assert second.program(MBPP["code"]) == read_problems(path)[4].program(MBPP["code"])
    path.write_text(json.dumps(tasks[1]) + "\n")
    with pytest.raises(ConfigError, match="--shots 3 takes task 3 of MBPP, which is not there"):
        read_problems(path, shots=3)
