"""Names of what lies in a run's folder, and in each of its checkpoints.

The tree:

    runs/NAME/
      config.yaml  metrics.jsonl  lease.json  verdict.json  logs/  tensorboard/  submissions/
      checkpoints/
        latest                     text: the name of the newest complete checkpoint
        step_00000500/
          manifest.json            every other file with its size and checksum
          state.json               step, tokens, data position, layout, validation loss
          config.yaml              the run as it was, resolved; can be passed to pipeline.train
          tokenizer.json           of the data
          imported.json            of a run that began with a model: what that was beside weights
          tensors/rank_00000.safetensors ...
          review/losses_epoch_01.npy ...  of a run with data.review: losses of each sequence
        step_00001000.partial/     being written or deleted; never read
        superseded_step_00001500/  what a run that went back to step 1000 left behind; never read
"""

import re
from pathlib import Path

RESOLVED_CONFIG_NAME = "config.yaml"
FOLDER = "checkpoints"
LATEST = "latest"
MANIFEST = "manifest.json"
STATE_NAME = "state.json"
TOKENIZER = "tokenizer.json"
IMPORTED = "imported.json"
WEIGHTS = "tensors"
REVIEW = "review"
PARTIAL = ".partial"

_STEP = re.compile(r"step_([0-9]{8,18})")
_PARTIAL = re.compile(_STEP.pattern + re.escape(PARTIAL))
_SAVED = {MANIFEST, STATE_NAME, RESOLVED_CONFIG_NAME, TOKENIZER, IMPORTED}
_SAVED_TENSORS = re.compile(rf"{WEIGHTS}/rank_[0-9]{{5,}}\.safetensors")
_SAVED_LOSSES = re.compile(rf"{REVIEW}/(losses_epoch|rescored_phase|kept_phase)_[0-9]+\.npy")
FOLDERS = (WEIGHTS, REVIEW)


def step_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies below the checkpoints' folder."""
    return directory / f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """The step in the name of a committed checkpoint; None for any other name."""
    found = _STEP.fullmatch(path.name)
    return int(found[1]) if found else None


def is_partial(path: Path) -> bool:
    """Whether a path is named as a save that was not committed, or a deletion that did not end."""
    return _PARTIAL.fullmatch(path.name) is not None


def is_saved(name: str) -> bool:
    """Whether saves write a file of this name below a checkpoint; no other is ever deleted."""
    forms = (_SAVED_TENSORS, _SAVED_LOSSES)
    return name in _SAVED or any(form.fullmatch(name) for form in forms)


def committed(directory: Path) -> list[Path]:
    """Checkpoints that were committed below the checkpoints' folder, oldest first."""
    if not directory.is_dir():
        return []
    found = [(step, path) for path in directory.iterdir() if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found) if path.is_dir()]
