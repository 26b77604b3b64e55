"""Ranks that would run something else than rank 0: refused by name before they meet the others."""

import json
import socket
from pathlib import Path

import pytest

from pipeline.distributed.identity import Identity
from tests.support.training_runs import start_job

MAIN = Identity("node1", {"train.steps": "10", "run.seed": "7"}, {"pipeline/job.py": "a"})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            MAIN._replace(config=MAIN.config | {"train.steps": "20"}),
            ["another configuration", "train.steps is 20 there and 10 on rank 0"],
        ),
        (MAIN._replace(config={"run.seed": "7"}), ["train.steps is not known there and 10"]),
        (MAIN._replace(code={"pipeline/job.py": "b"}), ["other code", "(pipeline/job.py differ)"]),
        (MAIN._replace(code={**MAIN.code, "torch": "2.9"}), ["other code", "(torch differ)"]),
    ],
)
def test_a_difference_is_named(other: Identity, words: list[str]) -> None:
    """Rank, both nodes, and what differs."""
    message = other._replace(host="node3").problem("rank 5/8", MAIN)
    assert message is not None
    for word in ["rank 5/8 on node3", "rank 0 on node1", *words]:
        assert word in message


def test_equal_ranks_have_no_problem() -> None:
    """Another node is no difference; the text that goes through the store says all."""
    assert MAIN._replace(host="node3").problem("rank 5/8", MAIN) is None
    assert Identity.from_text(MAIN.to_text()) == MAIN


def test_this_process_is_its_values_and_its_files() -> None:
    """The values of the configuration, this project's files, and the libraries' versions."""
    found = Identity.of_this_process({"train": {"steps": 3}}, device="cpu")
    assert found.config == {"train.steps": "3", "device": "cpu"}
    assert found.host == socket.gethostname()
    assert {"pipeline/trainer.py", "model/backward.py", "Python", "torch"} <= found.code.keys()
    assert json.loads(found.to_text())[1]["train.steps"] == "3"


def test_a_rank_with_another_configuration_is_refused(config: Path, tmp_path: Path) -> None:
    """Both ranks end before the first step with the rank and the key."""
    steps = {rank: ["--set", f"train.steps={steps}"] for rank, steps in enumerate((10, 20))}
    outcome = start_job(tmp_path, [str(config)], world=2, more_arguments=steps).finish()
    assert outcome.codes == [2, 2], outcome.output
    for output in outcome.output:
        assert "rank 1/2" in output
        assert "train.steps is 20 there and 10 on rank 0" in output
        assert "Traceback" not in output
