"""Checks of the file system under the run's folder: shared, exclusive, renaming, speed, room."""

import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

from foundation.durable_files import read_entry, sync_folder, write_synced
from pipeline.config.run_config import RunConfig
from pipeline.diagnosis.check import Check, Context, Outcome, ranks_text
from pipeline.distributed.agreement import from_all

_POLL_S = 0.1
_TRIALS = 8
_WRITTEN_BYTES = 16 << 20
_STATE_BYTES = 12  # of a trained parameter in a checkpoint: weight and both moments in fp32
_LITTLE = 0.1  # of free room, that other things may need


def _shared(context: Context) -> str:
    """Write this rank's name; wait for the name that rank 0 wrote.

    Returns:
        This rank's host.

    Raises:
        OSError: rank 0's file does not come to be seen.
    """
    rank = context.info.rank
    own = context.folder / f"seen_{rank}"
    main = context.folder / "seen_0"
    until = time.monotonic() + context.seen_within_s
    # A rank whose node has another folder of that name must not write into it.
    while rank and not main.is_file():
        if time.monotonic() > until:
            raise OSError(
                f"run.dir={context.folder.parent} is not the folder that rank 0 sees: what rank 0 "
                f"wrote there did not appear within {context.seen_within_s:g} s; put run.dir on "
                "storage that all nodes share"
            )
        time.sleep(_POLL_S)
    write_synced(own, socket.gethostname().encode())
    return socket.gethostname()


def _judge_shared(context: Context, hosts: list[str]) -> Outcome:
    """Rank 0 must see the file of each rank, too."""
    missing: list[int] = []
    if context.info.rank == 0:
        until = time.monotonic() + context.seen_within_s
        while True:
            missing = [r for r in range(len(hosts)) if not (context.folder / f"seen_{r}").is_file()]
            if not missing or time.monotonic() > until:
                break
            time.sleep(_POLL_S)
    missing = from_all(missing)[0]
    figure = f"{context.folder.parent} is one folder on {len(set(hosts))} hosts"
    if not missing:
        return Outcome(figure)
    return Outcome(
        "not shared",
        [
            f"run.dir={context.folder.parent}: rank 0 does not see the files of "
            f"{ranks_text(missing)} (on {hosts[missing[0]]}) within {context.seen_within_s:g} s; "
            "put run.dir on storage that all nodes share"
        ],
    )


class _FileSystem(NamedTuple):
    """What a rank measured.

    Attributes:
        won: exclusive creations that this rank won.
        renamed: whether a renamed folder appeared whole here.
        write_bytes_s: bytes/s of a synced file.
        read_bytes_s: bytes/s of reading it back.
        sync_s: seconds of writing a small file through.
    """

    won: int
    renamed: bool
    write_bytes_s: float
    read_bytes_s: float
    sync_s: float


def _file_system(context: Context) -> _FileSystem:
    """All ranks at once: create one file each time, rename, write and read."""
    rank, folder = context.info.rank, context.folder
    won = 0
    for trial in range(_TRIALS):
        from_all(None)  # all at the same time
        try:
            os.close(os.open(folder / f"once_{trial}", os.O_CREAT | os.O_EXCL | os.O_RDWR))
            won += 1
        except FileExistsError:
            pass
    if rank == 0:
        partial = folder / "renamed.partial"
        partial.mkdir()
        write_synced(partial / "content", b"whole")
        sync_folder(partial)
        partial.rename(folder / "renamed")
        sync_folder(folder)
    from_all(None)
    renamed = _appears(folder / "renamed" / "content", b"whole", context.seen_within_s)
    path, content = folder / f"written_{rank}", os.urandom(1 << 20) * (_WRITTEN_BYTES >> 20)
    started = time.perf_counter()
    entry = write_synced(path, content)
    written_s = time.perf_counter() - started
    started = time.perf_counter()
    if read_entry(path) != entry:
        raise OSError(f"{path.parent.parent}: a file reads back otherwise than it was written")
    read_s = time.perf_counter() - started
    path.unlink()
    started = time.perf_counter()
    write_synced(folder / f"small_{rank}", b"x")
    sync_s = time.perf_counter() - started
    return _FileSystem(won, renamed, len(content) / written_s, len(content) / read_s, sync_s)


def _appears(path: Path, content: bytes, within_s: float) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            return path.read_bytes() == content
        except OSError:
            time.sleep(_POLL_S)
    return False


def _judge_file_system(context: Context, ranks: list[_FileSystem]) -> Outcome:
    problems = []
    won = sum(found.won for found in ranks)
    if won != _TRIALS:
        problems.append(
            f"run.dir={context.folder.parent}: {_TRIALS} files were created exclusively {won} "
            "times over all ranks, so that two jobs could write into one run; use a file system "
            "with exclusive creation (NFS from version 3 on, Lustre, GPFS, BeeGFS)"
        )
    if late := [rank for rank, found in enumerate(ranks) if not found.renamed]:
        problems.append(
            f"run.dir={context.folder.parent}: a renamed folder is not whole on "
            f"{ranks_text(late)}; use a file system whose renames are seen by all nodes"
        )
    write = min(found.write_bytes_s for found in ranks) / 1e6
    read = min(found.read_bytes_s for found in ranks) / 1e6
    sync = max(found.sync_s for found in ranks) * 1000
    return Outcome(
        f"exclusive creation, rename; slowest rank writes {write:.0f} MB/s, reads {read:.0f} MB/s, "
        f"a small file through in {sync:.1f} ms",
        problems,
    )


def _disk(context: Context) -> tuple[int, int]:
    """Free bytes and file names under the run's folder."""
    folder = context.config.run.dir
    while not folder.exists():
        folder = folder.parent
    names = os.statvfs(folder)
    # Some file systems count no names and say 0 of 0.
    return shutil.disk_usage(folder).free, names.f_favail if names.f_files else 1 << 62


def kept_checkpoints(config: RunConfig) -> int:
    """How many checkpoints the folder holds at most: one is written before one is deleted."""
    section = config.checkpoint
    for_good = config.last_step // section.keep_every if section.keep_every else 0
    written = config.last_step // section.every_steps + 1 if section.every_steps else 1
    return min(section.keep + 1 + for_good + section.keep_best, written)


def _judge_disk(context: Context, ranks: list[tuple[int, int]]) -> Outcome:
    config = context.config
    free, names = min(found[0] for found in ranks), min(found[1] for found in ranks)
    each = _STATE_BYTES * config.model.num_parameters()
    kept = kept_checkpoints(config)
    needed = each * kept
    problems = []
    if free < needed * (1 + _LITTLE):
        problems.append(
            f"run.dir={config.run.dir} has {_gib(free)} free, and {kept} checkpoints of "
            f"{_gib(each)} need {_gib(needed)}; free some, set another run.dir, or keep fewer "
            "(checkpoint.keep, keep_every, keep_best)"
        )
    files = kept * (context.info.world_size + 8)
    if names < files:
        problems.append(
            f"run.dir={config.run.dir} has room for {names:,} more files, and {kept} checkpoints "
            f"have {files:,}; delete files there, or set another run.dir"
        )
    return Outcome(
        f"{_gib(free)} free, {kept} checkpoints of {_gib(each)} need {_gib(needed)}", problems
    )


def _gib(size: Any) -> str:
    return f"{size / 2**30:.3g} GiB"


SHARED = Check("run.dir", _shared, _judge_shared)
CHECKS = (
    Check("file system", _file_system, _judge_file_system, patience=2),
    Check("disk", _disk, _judge_disk),
)
