"""Files of earlier versions go on or are refused by name; those of later ones are refused by name.

`versions/` holds what earlier versions wrote: a tiny shard set, a checkpoint of each version of the
manifest, and the configuration of their run. manifest_2 has a config.yaml without a version.
"""

import json
import shutil
from pathlib import Path

import pytest

from foundation.durable_files import entry_of
from pipeline.checkpoint.file_names import FOLDER, step_folder
from pipeline.checkpoint.files import read_manifest, write_manifest
from pipeline.checkpoint.retention import Retention
from pipeline.config.sections import CheckpointSection
from pipeline.config.versions import CONFIG_VERSION
from tests.support.checkpoint_cases import commit
from tests.support.training_runs import metrics_without_times, run_job

VERSIONS = Path(__file__).with_name("versions")
NAME = "step_00000003"


def _copy(tmp_path: Path, version: str) -> tuple[Path, list[str]]:
    """A run folder with the checkpoint of a version, and the arguments that go on from it."""
    run_dir = tmp_path / version
    shutil.copytree(VERSIONS / version, run_dir)
    return run_dir, _arguments(run_dir)


def _arguments(run_dir: Path) -> list[str]:
    settings = [f"run.dir={run_dir}", f"data.shards={VERSIONS / 'shards'}", "train.stop_at_step=6"]
    return [str(VERSIONS / "tiny.yaml"), "--set", *settings]


def _rewrite(checkpoint: Path, name: str, content: bytes) -> None:
    """Change a file as another version would have written it, manifest included."""
    entries = read_manifest(checkpoint)
    (checkpoint / name).write_bytes(content)
    write_manifest(checkpoint, entries | {name: entry_of(content)})


def test_an_earlier_checkpoint_goes_on(tmp_path: Path) -> None:
    """The kept checkpoint is resumed from, and the steps after it are those of an unbroken run."""
    run_dir, arguments = _copy(tmp_path, "manifest_2")
    outcome = run_job(tmp_path, arguments)
    assert outcome.codes == [0], outcome.output
    assert f"resumed from {run_dir}/checkpoints/{NAME}: step 3" in outcome.output[0]
    assert run_job(tmp_path, _arguments(tmp_path / "straight")).codes == [0]
    straight = metrics_without_times(tmp_path / "straight")[3:]
    resumed = metrics_without_times(run_dir)
    assert [record["step"] for record in resumed] == [4, 5, 6]
    for record, expected in zip(resumed, straight, strict=True):
        # Another machine's sums may differ in their last digits.
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_the_first_manifests_are_refused_by_version(tmp_path: Path) -> None:
    """Nobody takes them for damaged, and retention leaves them alone."""
    run_dir, arguments = _copy(tmp_path, "manifest_1")
    outcome = run_job(tmp_path, arguments)
    assert outcome.codes == [2]
    assert "manifest.json has version 1, and this Headway reads version 2" in outcome.errors[0]
    assert "train.init_from" in outcome.errors[0]
    for step in (4, 6, 8):
        commit(run_dir, step, CheckpointSection(keep=2))
    assert step_folder(run_dir / FOLDER, 3).is_dir()
    Retention(run_dir / FOLDER, CheckpointSection()).wait()


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "config.yaml"])
def test_a_later_version_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """It is neither damaged nor passed over for an older checkpoint that would be gone on from."""
    run_dir, arguments = _copy(tmp_path, "manifest_2")
    checkpoint = step_folder(run_dir / FOLDER, 3)
    if name == "config.yaml":
        text = f"version: {CONFIG_VERSION + 1}\n" + (checkpoint / name).read_text()
        _rewrite(checkpoint, name, text.encode())
        version = CONFIG_VERSION + 1
    else:
        content = json.loads((checkpoint / name).read_text())
        version = content["version"] = content["version"] + 1
        if name == "manifest.json":
            (checkpoint / name).write_text(json.dumps(content))
        else:
            _rewrite(checkpoint, name, json.dumps(content).encode())
    outcome = run_job(tmp_path, arguments)
    assert outcome.codes == [2]
    assert f"{name} has version {version}" in outcome.errors[0]
    assert "use the Headway that wrote it" in outcome.errors[0]
    assert "damaged" not in outcome.output[0]
    assert sorted(path.name for path in (run_dir / FOLDER).iterdir()) == ["latest", NAME]


def test_an_unknown_key_does_not_end_a_run(tmp_path: Path) -> None:
    """A key that this version lacks is named and left out; one of the model is refused."""
    run_dir, arguments = _copy(tmp_path, "manifest_2")
    checkpoint = step_folder(run_dir / FOLDER, 3)
    text = (checkpoint / "config.yaml").read_text()
    changed = text.replace("log:\n", "log:\n  colors: true\n") + "telemetry: {on: false}\n"
    _rewrite(checkpoint, "config.yaml", changed.encode())
    outcome = run_job(tmp_path, [*arguments, "train.stop_at_step=4"])
    assert outcome.codes == [0], outcome.output
    for key in ("log.colors", "telemetry"):
        assert f"unknown key {key} is left out" in outcome.output[0]
    newest = step_folder(run_dir / FOLDER, 4)
    assert (newest / "config.yaml").read_text().startswith(f"version: {CONFIG_VERSION}\n")
    _rewrite(newest, "config.yaml", text.replace("model:\n", "model:\n  gates: 2\n").encode())
    outcome = run_job(tmp_path, arguments)
    assert outcome.codes == [2]
    assert "model.gates" in outcome.errors[0]
