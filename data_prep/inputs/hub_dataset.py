"""Datasets by name: `datasets` finds the files of a split, this package reads them.

    hf:NAME[:CONFIG][@SPLIT][#REVISION]

NAME is a dataset of the Hugging Face Hub or a folder laid out like one. The dataset's own streams
are not used: they know neither their number of rows nor how to begin in the middle, so no part of
them could be claimed, repeated or finished by another worker; and one malformed record ends them.
The files themselves are cut into units, restarted and counted like any other input.

A file of the Hub is named by its commit, `hf://datasets/NAME@COMMIT/FILE`: that is what plan and
manifest hold, so a dataset that has changed is another input. It is read from a copy in the cache
of `huggingface_hub` (HF_HOME), which a worker that lacks it fetches.
"""

import errno
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.errors import DataError
from data_prep.inputs.file_names import format_of

PREFIX = "hf:"
PARALLEL_DOWNLOADS = 8
_LONGEST_REASON = 200
_NAME = re.compile(
    r"hf:(?P<name>[^:@#]+)(?::(?P<config>[^:@#]+))?(?:@(?P<split>[^:@#]+))?(?:#(?P<revision>[^:@#]+))?"
)
_PINNED = re.compile(r"hf://datasets/(?P<name>[^@]+)@(?P<revision>[0-9a-f]{40,64})/(?P<file>.+)")


class DatasetName(NamedTuple):
    """What an --input of this form asks for; the default of each part is None."""

    name: str
    config: str | None
    split: str | None
    revision: str | None


def is_dataset_name(path: Path) -> bool:
    """Whether an --input names a dataset instead of a file or folder."""
    return os.fspath(path).startswith(PREFIX)


def find_dataset_files(path: Path) -> list[str]:
    """The files of one split of a dataset, in their order: paths, or names on the Hub.

    Raises:
        DataError: There is no such dataset, configuration or split, the Hub cannot be reached, or
            the files are of a format that is not read.
    """
    given = os.fspath(path)
    wanted = _parse(given)
    builder = _open(given, wanted)
    splits: dict[str, Sequence[str]] = builder.config.data_files or {}
    listed = ", ".join(splits)
    if wanted.split is None and len(splits) != 1:
        raise DataError(
            f"--input {given} has the splits {listed or 'of no files'}; name one, for example "
            f"{given}@{next(iter(splits), 'train')}"
        )
    split = wanted.split or next(iter(splits))
    if split not in splits:
        raise DataError(f"--input {given}: there is no split {split!r}; there are {listed}")
    files = [str(file) for file in splits[split]]
    for file in files:
        if not _is_read(file):
            raise DataError(
                f"--input {given} holds {file}, which is of a format that is not read; read are "
                ".jsonl, .json and .txt (also compressed), .parquet and .arrow: convert it"
            )
    _fetch_all(files)
    return files


def is_pinned(name: str) -> bool:
    """Whether an input file is one of the Hub, whose content its name determines."""
    return _PINNED.fullmatch(name) is not None


def local_path(name: str) -> str:
    """Where an input file can be opened: itself, or the copy of a file of the Hub.

    Raises:
        FileNotFoundError: There is no copy on this machine.
    """
    pinned = _PINNED.fullmatch(name)
    if pinned is None:
        return name
    from huggingface_hub import try_to_load_from_cache

    copy = try_to_load_from_cache(
        pinned["name"], pinned["file"], revision=pinned["revision"], repo_type="dataset"
    )
    if not isinstance(copy, str):
        raise FileNotFoundError(errno.ENOENT, "no copy in the cache of the Hub (HF_HOME)", name)
    return copy


def fetch(name: str) -> None:
    """Bring a file of the Hub to this machine, if it is one and not here yet.

    Raises:
        DataError: It cannot be fetched.
    """
    pinned = _PINNED.fullmatch(name)
    if pinned is None:
        return
    from huggingface_hub import hf_hub_download

    try:
        local_path(name)
    except FileNotFoundError:
        try:
            hf_hub_download(
                pinned["name"], pinned["file"], revision=pinned["revision"], repo_type="dataset"
            )
        except Exception as error:  # of HTTP, of the disk, of access: the library has a dozen kinds
            raise DataError(
                f"cannot fetch {name}: {_reason(error)}; run the same command again, or let all "
                "machines share HF_HOME"
            ) from error


def _parse(given: str) -> DatasetName:
    found = _NAME.fullmatch(given)
    if found is None:
        raise DataError(
            f"--input {given} is not of the form hf:NAME[:CONFIG][@SPLIT][#REVISION], for example "
            "hf:allenai/c4:en@train"
        )
    wanted = DatasetName(*found.group("name", "config", "split", "revision"))
    if wanted.revision is not None and os.path.isdir(wanted.name):
        raise DataError(f"--input {given}: {wanted.name} is a folder and has no revisions")
    return wanted


def _open(given: str, wanted: DatasetName) -> Any:
    """What `datasets` knows of a dataset without its data."""
    import datasets

    try:
        return datasets.load_dataset_builder(wanted.name, wanted.config, revision=wanted.revision)
    except Exception as error:  # of names, of HTTP, of access: the library has a dozen kinds
        local = (
            ""
            if os.path.isdir(wanted.name)
            else (
                f", or fetch it where there is a network (hf download {wanted.name} --repo-type "
                "dataset --local-dir DIR) and give --input hf:DIR"
            )
        )
        raise DataError(
            f"--input {given} cannot be opened: {_reason(error)}; check the name{local}"
        ) from error


def _is_read(name: str) -> bool:
    """Whether a file holds records, or is one plain text; a table as text is neither."""
    form = format_of(name)
    return form is not None and (form.kind != "text" or ".txt" in Path(name).suffixes)


def _fetch_all(files: Sequence[str]) -> None:
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as threads:
        list(threads.map(fetch, files))


def _reason(error: Exception) -> str:
    """What a library says, in one line."""
    line = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return line if len(line) <= _LONGEST_REASON else line[:_LONGEST_REASON] + "..."
