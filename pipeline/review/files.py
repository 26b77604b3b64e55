"""Files of a run's review: an array each, in the run's folder and linked into its checkpoints.

    runs/NAME/review/
      losses_epoch_01.npy   float32 [sequences]: mean loss of head 1 when the sequence was trained
                            on; -1 = not in this epoch (yet), nan = the loss was not finite
      rescored_phase_2.npy   float32 [sequences]: with staleness: rescore, the same before the
                            choice; -1 = not read again
      kept_phase_2.npy      uint8 [ceil(sequences / 8)]: np.unpackbits(...)[i] = sequence i is in it
      index.json            phases and epochs, with the size and checksum of each file

The same arrays lie in `review/` of each checkpoint, with that of the epoch that is going on. What
is complete is never written again, so a checkpoint links it.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import DTypeLike, NDArray

from foundation.durable_files import FileEntry, read_entry, sync_file, whole_file, write_whole
from foundation.shown_text import reason
from pipeline.checkpoint.file_names import REVIEW

INDEX = "index.json"
_CHUNK = 1 << 26  # bytes


def losses_name(number: int) -> str:
    """The file of a pass, which people count from 1."""
    return f"losses_epoch_{number + 1:02d}.npy"


def kept_name(phase: int) -> str:
    """The file of a phase's sequences, which people count from 1."""
    return f"kept_phase_{phase + 1}.npy"


def rescored_name(phase: int) -> str:
    """The file of losses that sequences had when a phase's were chosen."""
    return f"rescored_phase_{phase + 1}.npy"


def write_array(path: Path, array: NDArray[Any]) -> FileEntry:
    """Write an array through to the disk, and see that the disk has it.

    Raises:
        OSError: it cannot be written, or reads back as something else.
    """
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    entry = read_entry(path)
    found = read_array(path, array.dtype, len(array)).view(np.uint8)
    wanted = array.view(np.uint8)
    # A part at a time: what compares all at once makes another array of that size.
    parts = [slice(start, start + _CHUNK) for start in range(0, max(len(wanted), 1), _CHUNK)]
    if not all(np.array_equal(found[part], wanted[part]) for part in parts):
        raise OSError(f"{path.name} reads back from the disk as something else than was written")
    return entry


def read_array(path: Path, kind: DTypeLike, length: int) -> NDArray[Any]:
    """An array as it lies on the disk, read where it is looked at.

    Args:
        path: the file.
        kind: of its numbers.
        length: how many they are.

    Raises:
        OSError: it cannot be read, or is another array.
    """
    try:
        # Not np.load, which takes archives for arrays, too, and fails in ways of its own then.
        array: NDArray[Any] = open_memmap(path, mode="r")
    except (ValueError, SyntaxError, TokenError) as error:
        raise OSError(f"{path} is no array ({reason(error)})") from None
    if array.dtype != kind or array.shape != (length,):
        raise OSError(
            f"{path} is no array of {length:,} {np.dtype(kind).name} but of {array.shape} "
            f"{array.dtype.name}"
        )
    return array


def read_losses(path: Path, sequences: int) -> NDArray[np.float32]:
    """Losses of an epoch, or of what was read again, as `read_array` reads them.

    Raises:
        OSError: they cannot be read, or are of another number of sequences.
    """
    return read_array(path, np.float32, sequences)


def read_kept(path: Path, sequences: int) -> NDArray[np.uint8]:
    """The bits of a choice among so many sequences, as `read_array` reads them.

    Raises:
        OSError: they cannot be read, or are of another number of sequences.
    """
    return read_array(path, np.uint8, -(-sequences // 8))


def put_beside(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no links.

    Raises:
        OSError: it cannot be made.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync_file(target)


def write_index(folder: Path, content: Mapping[str, Any]) -> None:
    """Write down what there is."""
    write_whole(folder / INDEX, (json.dumps(content, indent=1) + "\n").encode())


def review_folder(run_dir: Path) -> Path:
    """Where a run's review lies."""
    return run_dir / REVIEW
