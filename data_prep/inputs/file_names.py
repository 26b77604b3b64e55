"""Which file names are read, how, and which of a directory are taken or left out."""

from pathlib import Path
from typing import Literal, NamedTuple

from data_prep.inputs.codecs import CODECS

Kind = Literal["jsonl", "json", "text", "parquet", "arrow"]

_TEXT_SUFFIXES = """
.adoc .asm .awk .bash .bat .bib .c .cc .cfg .clj .cmake .cpp .cs .css .csv .cu .cuh .cxx .d .dart
.diff .el .erl .ex .exs .f .f90 .for .go .gradle .graphql .groovy .h .hh .hpp .hs .htm .html .hxx
.inc .ini .java .jl .js .jsx .kt .kts .less .lisp .lua .m .m4 .mak .markdown .md .mk .ml .mli .mm
.nim .nix .patch .php .pl .pm .po .proto .ps1 .py .pyi .pyx .r .rb .rs .rst .s .sass .scala .scm
.scss .sh .sql .svelte .swift .tcl .tex .texi .toml .ts .tsx .tsv .txt .v .vhd .vim .vue .xml .yaml
.yml .zig .zsh
"""
_TEXT_NAMES = """
AUTHORS CHANGELOG CHANGES CONTRIBUTING COPYING Dockerfile INSTALL Kconfig LICENSE Makefile NEWS
NOTICE README TODO
"""
_IGNORED_DIRECTORIES = """
__pycache__ node_modules site-packages dist-packages .git .hg .svn .tox .nox .venv .eggs .cache
.mypy_cache .ruff_cache .pytest_cache .hypothesis .ipynb_checkpoints
"""
_UNREADABLE_SUFFIXES = """
.7z .bin .bz2 .feather .lz4 .npy .npz .orc .pkl .pt .rar .safetensors .tar .tbz .tgz .txz .whl .zip
"""
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}

TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
TEXT_NAMES = frozenset(_TEXT_NAMES.split())
IGNORED_DIRECTORIES = frozenset(_IGNORED_DIRECTORIES.split())
UNREADABLE_SUFFIXES = frozenset(_UNREADABLE_SUFFIXES.split())


class FileFormat(NamedTuple):
    """How a file is read: what its content is, and the suffix of its compression, if any."""

    kind: Kind
    codec: str


def format_of(name: str) -> FileFormat | None:
    """How the file `name` is read; None when its suffixes say that it cannot be.

    Examples: a.jsonl.gz is jsonl in .gz, Makefile is text, a.tar.gz and a.gz are not read.
    """
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    codec = suffixes.pop() if suffixes and suffixes[-1] in CODECS else ""
    suffix = suffixes[-1] if suffixes else ""
    kind = _KINDS.get(suffix, "text")
    if suffix in UNREADABLE_SUFFIXES or (codec and kind in ("parquet", "arrow")):
        return None
    if codec and kind == "text" and suffix not in TEXT_SUFFIXES:
        return None
    return FileFormat(kind, codec)


def is_taken(name: str) -> bool:
    """True for files that are taken from a directory when no pattern is given.

    All that is read by its suffix, but for .json: among source code files most are settings.
    """
    form = format_of(name)
    if form is None or form.kind == "json":
        return False
    suffix = Path(name.lower().removesuffix(form.codec)).suffix
    return form.kind != "text" or name in TEXT_NAMES or suffix in TEXT_SUFFIXES
