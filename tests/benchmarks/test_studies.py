"""The studies: their data are what they say, runs are not repeated, and a try gives a table."""

import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.studies.choice_points.tables import (
    identity_gap,
    random_table,
    relative_gap,
    terms_at,
)
from benchmarks.studies.finetuning.words import make_question, make_text
from benchmarks.studies.grid import load_grid, point_name, variants
from benchmarks.studies.induction.stories import tell, two_token_names
from benchmarks.studies.polynomials.problems import make_problem
from benchmarks.studies.polynomials.ring import SIZE, add, compose, multiply, negate
from benchmarks.studies.runner import plan_run
from pipeline.config.review_section import ReviewSection
from pipeline.review.schedule import ReviewSchedule
from tests.support.tiny_export import byte_tokenizer

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "benchmarks" / "studies"


def random_element(generator: random.Random) -> tuple[int, ...]:
    """Of the ring."""
    return tuple(generator.randrange(7) for _ in range(SIZE))


def test_the_ring_is_one() -> None:
    """Axioms on random elements; composition with X changes nothing."""
    generator = random.Random(1)
    zero, one, x = (0,) * 5, (1, 0, 0, 0, 0), (0, 1, 0, 0, 0)
    for _ in range(200):
        f, g, h = (random_element(generator) for _ in range(3))
        assert add(f, negate(f)) == zero
        assert multiply(f, one) == f
        assert multiply(f, g) == multiply(g, f)
        assert multiply(multiply(f, g), h) == multiply(f, multiply(g, h))
        assert multiply(f, add(g, h)) == add(multiply(f, g), multiply(f, h))
        assert compose(f, x) == f == compose(x, f)
        assert compose(add(f, g), h) == add(compose(f, h), compose(g, h))


def value(text: str) -> list[int]:
    """An expression's value by whole polynomials over the integers, reduced at every step."""
    if text[0] != "(":
        return [int(digit) for digit in text]
    inner = text[1:-1]
    if inner[0] == "-":
        return [-a % 7 for a in value(inner[1:])]
    depth = 0
    for place, letter in enumerate(inner):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0 and letter in "+*@":
            left, right = value(inner[:place]), value(inner[place + 1 :])
            break
    if letter == "+":
        return [(a + b) % 7 for a, b in zip(left, right, strict=True)]

    def product(f: list[int], g: list[int]) -> list[int]:
        found = [0] * (len(f) + len(g) - 1)
        for i, a in enumerate(f):
            for j, b in enumerate(g):
                found[i + j] += a * b
        return found

    if letter == "*":
        whole = product(left, right)
    else:
        whole, power = [0], [1]
        for a in left:
            length = max(len(whole), len(power))
            whole = [
                (whole[i] if i < len(whole) else 0) + a * (power[i] if i < len(power) else 0)
                for i in range(length)
            ]
            power = product(power, right)
    return [a % 7 for a in (whole + [0] * 5)[:5]]


@pytest.mark.parametrize("operations", [1, 2, 3, 5, 7])
def test_answers_are_right(operations: int) -> None:
    """By another way of calculating; and so many operators are in the question."""
    generator = random.Random(operations)
    for _ in range(100):
        problem = make_problem(generator, operations, pauses=2)
        assert problem.question.endswith("__=")
        text = problem.question[:-3]
        assert sum(text.count(sign) for sign in "-+*@") == operations
        assert problem.answer == "".join(map(str, value(text)))


def test_the_identities_hold() -> None:
    """On random tables of unequal sizes; a wrong one would not."""
    generator = random.Random(3)
    for _ in range(50):
        p, q = random_table(generator, 4, 6), random_table(generator, 4, 6)
        assert abs(identity_gap(p)) < 1e-12
        assert abs(relative_gap(p, q)) < 1e-12
        assert abs(relative_gap(p, q) - relative_gap(q, q)) < 1e-12
    assert [terms_at(20, 40, n) for n in (1, 2, 4, 8)] == [1, 3, 10, 36]


def test_stories_name_their_characters() -> None:
    """Both of them, more than once; and names of two tokens are that."""
    generator = random.Random(2)
    names = ["Anna", "Boris", "Clara"]
    for _ in range(50):
        story = tell(generator, names)
        assert len(set(story.names)) == 2
        assert sum(story.text.count(name) for name in story.names) > 3
        assert "{" not in story.text


def test_names_are_two_tokens_after_a_space() -> None:
    """Of a tokenizer trained on stories; one of plain bytes has no such tokens."""
    generator = random.Random(4)
    names = ["Tolira", "Kamo", "Bensu", "Duvapo", "Lisero"]
    stories = [tell(generator, names).text for _ in range(300)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(stories, trainer)
    found = two_token_names(backend, 20, seed=1)
    assert len(set(found)) == 20
    for name in found:
        assert len(backend.encode(" " + name).ids) == 2, name
        assert name.istitle()
    plain = Tokenizer.from_str(byte_tokenizer().decode())
    assert two_token_names(plain, 5, seed=1) == []


def test_questions_on_words_are_answered() -> None:
    """Letter by letter, by another way; and no word that is asked is ever shown."""
    generator = random.Random(6)
    after = str.maketrans("abcdefgh", "bcdefgha")
    steps: dict[str, Callable[[str], str]] = {
        "u": lambda word: word.upper(),
        "n": lambda word: word.translate(after),
        "s": lambda word: re.sub("(.)(.)", r"\2\1", word),
        "t": lambda word: "".join(word[place - 5] for place in range(6)),
        "c": lambda word: word,
    }
    asked, shown, signs = set[str](), set[str](), set[str]()
    for _ in range(500):
        for held_out, words in ((True, asked), (False, shown)):
            question = make_question(generator, asked=held_out)
            both, word = question.prompt.split()
            assert question.answer == steps[both[0]](steps[both[1]](word))
            words.add(word)
            signs.add(both)
        for line in make_text(generator).splitlines():
            sign, word, found = line.split()
            assert found == steps[sign](word)
            shown.add(word)
    assert len(asked) > 400
    assert not asked & shown
    assert signs == {"un", "us", "ut", "sn", "tn"}


def test_points_share_what_they_begin_with(tmp_path: Path) -> None:
    """The run of the same seed, once; another configuration of it is another point."""
    (tmp_path / "manifest.json").write_text('{"fingerprint": "f"}')
    prepared = {"texts": tmp_path, "questions": tmp_path}
    grid = load_grid(STUDIES / "finetuning" / "grid.yaml", quick=False)
    runs = [
        plan_run(grid, settings, tmp_path / point_name(settings), prepared)
        for settings in grid.settings()
    ]
    before = [run.before for run in runs if run.before]
    assert len(before) == len(runs) == 12
    assert len({run.folder for run in before}) == len({run.digest for run in before}) == 6
    for run, earlier in zip(runs, before, strict=True):
        assert run.config["train"]["init_from"] == str(earlier.export)
        assert run.config["run"]["seed"] == earlier.config["run"]["seed"]
        assert run.settings["train.init_from"] == f"n={earlier.config['model']['future_tokens']}"
    longer = {name: {**run, "train.steps": 7} for name, run in grid.pretrain.items()}
    settings, changed = runs[0].settings, grid._replace(pretrain=longer)
    assert plan_run(changed, settings, runs[0].folder, prepared).digest != runs[0].digest


def test_arms_are_settings_under_a_name(tmp_path: Path) -> None:
    """The run of a point has those of its arm, and equally many steps and tokens as the others."""
    (tmp_path / "manifest.json").write_text('{"fingerprint": "f"}')
    grid = load_grid(STUDIES / "lfr" / "grid.yaml")
    found = {}
    for settings in grid.settings():
        run = plan_run(grid, settings, tmp_path / point_name(settings), {"texts": tmp_path})
        assert "arm" not in run.config
        found[settings["arm"]] = run.config["data"]["review"]
        assert run.config["run"]["seed"] == settings["run.seed"]
    assert found == {name: arm["data.review"] for name, arm in grid.arms.items()}
    schedules = [
        ReviewSchedule(section, section.sequences or 0)
        for section in map(ReviewSection.model_validate, found.values())
    ]
    assert {one.passes[-1].end for one in schedules} == {6400}
    assert {one.steps(16) for one in schedules} == {400}


@pytest.mark.parametrize(
    "name", ["polynomials", "which_heads", "induction", "finetuning", "hmt", "lfr"]
)
def test_grids_are_whole(name: str) -> None:
    """At least three seeds; names of points differ; a quick try is a part; so with variants."""
    grid = load_grid(STUDIES / name / "grid.yaml", quick=False)
    points = list(grid.settings())
    assert len({point["run.seed"] for point in points}) >= 3
    assert len({point_name(point) for point in points}) == len(points)
    path = STUDIES / name / "grid.yaml"
    quick = list(load_grid(path, quick=True).settings())
    assert len(quick) < len(points)
    readme = (STUDIES / name / "README.md").read_text()
    for variant in variants(path):
        found = load_grid(path, variant=variant)
        assert len({point["run.seed"] for point in found.settings()}) >= 3
        assert found._replace(variant="") != grid
        assert f"<!-- {variant} begin -->" in readme


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("induction", marks=pytest.mark.stress),
        pytest.param("polynomials", marks=pytest.mark.stress),
        pytest.param("which_heads", marks=pytest.mark.stress),
        pytest.param("finetuning", marks=pytest.mark.stress),
        pytest.param("hmt", marks=pytest.mark.stress),
        pytest.param("lfr", marks=pytest.mark.stress),
    ],
)
def test_a_quick_try_gives_a_table_and_is_not_repeated(name: str, tmp_path: Path) -> None:
    """The second command trains nothing, and says the same."""
    command = [
        *(sys.executable, "-m", f"benchmarks.studies.{name}", "--quick"),
        *("--work", str(tmp_path / "work"), "--output", str(tmp_path)),
    ]
    (tmp_path / "README.md").write_text("<!-- study begin -->\n<!-- study end -->\n")
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "point 1 of" in first.stderr
    lines = (tmp_path / "README.md").read_text().splitlines()
    rest = itertools.dropwhile(lambda line: "|" not in line, lines)
    table = list(itertools.takewhile(lambda line: "|" in line, rest))  # curves have more of them
    points = list((tmp_path / "work").glob("*/result.json"))
    assert len(table) == 2 + len(points) > 2
    for path in points:
        figures = json.loads(path.read_text())["figures"]
        assert figures
        assert all(isinstance(figure, int | float) for figure in figures.values())
    assert "<svg" in (tmp_path / "result.html").read_text()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "point 1 of" not in again.stderr
    assert again.stdout == first.stdout
