"""Checkpoints: written aside, agreed by all ranks, listed with checksums, renamed; `latest` last.

A folder that lacks its manifest, or whose files differ from it, is never taken for a checkpoint.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from model.errors import CheckpointError
from pipeline.config import RESOLVED_CONFIG_NAME, RunConfig, load_config, to_yaml
from pipeline.launch import is_communication_error
from pipeline.state import STATE_NAME, TrainState

FOLDER = "checkpoints"
LATEST = "latest"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "zero"
_PARTIAL = ".partial"
_RUN_FILES = (FOLDER, "metrics.jsonl", "tensorboard", "wandb_id", RESOLVED_CONFIG_NAME)
_BLOCK_BYTES = 1 << 22

Entries = dict[str, dict[str, str | int]]


class CheckpointFolder:
    """The checkpoints of one run, on a file system that all ranks share.

    All methods but `steps` are collectives: every rank calls them together.

    Args:
        run_dir: the run's folder.
        keep: complete checkpoints to keep, the newest ones.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.directory = run_dir / FOLDER
        self.keep = keep

    def steps(self) -> list[Path]:
        """Folders that were committed, oldest first."""
        return sorted(path for path in self.directory.glob("step_*[0-9]") if path.is_dir())

    def save(
        self,
        state: TrainState,
        config: RunConfig,
        tokenizer: Path,
        write_weights: Callable[[Path], None],
    ) -> Path:
        """Write and commit one checkpoint, then drop the ones that are too many.

        Args:
            state: progress to save.
            config: the run, saved resolved.
            tokenizer: the tokenizer.json the data was made with.
            write_weights: collective that writes weights and optimizer states into a folder.

        Returns:
            The committed folder.

        Raises:
            CheckpointError: writing failed on some rank; nothing was committed.
        """
        final = self.directory / f"step_{state.step:08d}"
        partial = final.with_name(final.name + _PARTIAL)
        if _is_main():
            _attempt(lambda: _make_empty(partial), partial)
        dist.barrier()
        _attempt(lambda: write_weights(partial / WEIGHTS), partial)
        dist.barrier()
        if _is_main():
            _attempt(lambda: _write_texts(partial, state, config, tokenizer), partial)
        dist.barrier()
        names = _from_main(_file_names(partial) if _is_main() else None)
        entries = _collect_entries(partial, names)
        if _is_main():
            _attempt(lambda: self._commit(partial, final, entries), partial)
            self._drop_old(final)
        dist.barrier()
        return final

    def _commit(self, partial: Path, final: Path, entries: Entries) -> None:
        manifest = json.dumps({"version": 1, "files": entries}, indent=1)
        _write_synced(partial / MANIFEST, manifest.encode())
        if problems := size_problems(partial):
            raise OSError(f"not all ranks see the same files ({'; '.join(problems[:3])})")
        for folder in {path.parent for path in partial.rglob("*")}:
            _sync(folder)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync(self.directory)
        self._point_latest_at(final)

    def _point_latest_at(self, checkpoint: Path) -> None:
        aside = self.directory / (LATEST + _PARTIAL)
        _write_synced(aside, (checkpoint.name + "\n").encode())
        aside.replace(self.directory / LATEST)
        _sync(self.directory)

    def _drop_old(self, newest: Path) -> None:
        """Delete what is past `keep` and what killed saves left, after the newest is committed."""
        older = [path for path in self.steps() if path.name <= newest.name]
        for old in older[: -self.keep]:
            old.rename(old.with_name(old.name + _PARTIAL))
        for left in self.directory.glob(f"step_*{_PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)

    def find(self, resume: str, report: Callable[[str], None]) -> Path | None:
        """The checkpoint to resume from, verified by all ranks together.

        Args:
            resume: `auto` (newest whole one, None without any), or the path of a checkpoint, of a
                run or of its checkpoints folder.
            report: told of each damaged checkpoint that `auto` passes over.

        Raises:
            CheckpointError: the named checkpoint is missing or damaged.
        """
        if resume != "auto":
            chosen = checkpoint_path(Path(resume))
            if problems := verify(chosen):
                raise CheckpointError(
                    f"{chosen} is damaged: {'; '.join(problems[:3])}; use another checkpoint, or "
                    "--resume auto for the newest whole one"
                )
            return chosen
        names = _from_main([path.name for path in self.steps()])
        for name in reversed(names):
            problems = verify(self.directory / name)
            if not problems:
                return self.directory / name
            report(f"passing over {self.directory / name}: {'; '.join(problems[:3])}")
        if names:
            raise CheckpointError(
                f"all {len(names)} checkpoints in {self.directory} are damaged; check the storage, "
                "or begin anew with --resume none (they are then moved aside)"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Take checkpoints past `step` out of the way: this run goes on from there another way."""
        if _is_main():
            steps = self.steps()
            newer = [path for path in steps if int(path.name.removeprefix("step_")) > step]
            if newer and len(newer) < len(steps):
                self._point_latest_at(steps[-len(newer) - 1])  # first: it must never dangle
            for path in newer:
                aside = path.with_name(f"superseded_{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        dist.barrier()

    def set_aside(self, run_dir: Path) -> Path | None:
        """Move an earlier run's files out of the way of a new run that starts from nothing.

        Returns:
            Where they went; None when there were none. Rank 0 moves, all ranks wait.
        """
        target = None
        if _is_main() and (self.steps() or (run_dir / "metrics.jsonl").exists()):
            numbers = [path.name.removeprefix("previous_") for path in run_dir.glob("previous_*")]
            number = 1 + max((int(text) for text in numbers if text.isdigit()), default=0)
            target = run_dir / f"previous_{number}"
            target.mkdir(parents=True)
            for name in _RUN_FILES:
                if (run_dir / name).exists():
                    (run_dir / name).rename(target / name)
        dist.barrier()
        return target


def checkpoint_path(path: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest of a run or checkpoints folder.

    Raises:
        CheckpointError: there is none.
    """
    if (path / STATE_NAME).is_file() or (path / MANIFEST).is_file():
        return path
    for folder in (path, path / FOLDER):
        if (folder / LATEST).is_file():
            return folder / (folder / LATEST).read_text(encoding="utf-8").strip()
    raise CheckpointError(
        f"{path} is no checkpoint: it has neither {STATE_NAME} nor {LATEST}; give a folder such "
        "as runs/NAME/checkpoints/step_00000100, or the run's folder"
    )


def read_config(checkpoint: Path) -> RunConfig:
    """The resolved configuration in a checkpoint."""
    return load_config(checkpoint / RESOLVED_CONFIG_NAME)


def size_problems(checkpoint: Path) -> list[str]:
    """What is missing from a checkpoint or has another size than its manifest says."""
    try:
        entries = _manifest(checkpoint)
    except (OSError, ValueError, KeyError):
        return [f"{MANIFEST} is missing or unreadable"]
    problems = []
    for name, entry in entries.items():
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}")
    return problems


def _manifest(checkpoint: Path) -> Entries:
    entries: Entries = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    return entries


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint: sizes, then checksums; empty when it is whole.

    Works on one process and as a collective; then every rank reads its share and all agree.
    """
    problems = _from_main(size_problems(checkpoint))
    if problems:
        return problems
    entries: Entries = _from_main(_manifest(checkpoint) if _is_main() else None)
    found = _collect_entries(checkpoint, sorted(entries))
    return [f"{name} differs from its checksum" for name in entries if found[name] != entries[name]]


def _from_main(value: Any) -> Any:
    """Rank 0's value on all ranks: one view for all, whatever a node's file system has cached."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _file_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _collect_entries(folder: Path, names: list[str]) -> Entries:
    """Size and xxh3 of every file; each rank reads and syncs its share, all get all."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = {name: _entry(folder / name) for name in names[rank::world]}
    if world == 1:
        return mine
    gathered: list[Entries] = [{} for _ in range(world)]
    dist.all_gather_object(gathered, mine)
    return {name: entry for part in gathered for name, entry in sorted(part.items())}


def _entry(path: Path) -> dict[str, str | int]:
    """A file's manifest entry; one that this rank cannot read has no checksum to agree with."""
    try:
        return {"bytes": path.stat().st_size, "xxh3": _checksum(path)}
    except OSError as error:
        return {"bytes": -1, "xxh3": f"unreadable: {error.strerror}"}


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _attempt(action: Callable[[], None], partial: Path) -> None:
    """Do it, or leave nothing behind and say why.

    Raises:
        CheckpointError: it failed (disk full, no permission, ...).
    """
    try:
        action()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        if is_communication_error(error):
            raise  # another rank is gone; the disk is not to blame
        shutil.rmtree(partial, ignore_errors=True)
        free = _free_gib(partial)
        raise CheckpointError(
            f"cannot write checkpoint {partial.name.removesuffix(_PARTIAL)} below "
            f"{partial.parent}: {str(error).splitlines()[0]} ({free:.1f} GiB free there); make "
            "room or fix the folder, then start again: earlier checkpoints are untouched"
        ) from error


def _free_gib(path: Path) -> float:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 2**30


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_texts(folder: Path, state: TrainState, config: RunConfig, tokenizer: Path) -> None:
    _write_synced(folder / STATE_NAME, state.to_json().encode())
    _write_synced(folder / RESOLVED_CONFIG_NAME, to_yaml(config).encode())
    _write_synced(folder / TOKENIZER, tokenizer.read_bytes())


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
