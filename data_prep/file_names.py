"""Which file names in a directory are taken as text, read as .jsonl, or left out."""

from pathlib import Path

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
.7z .arrow .bin .bz2 .feather .gz .json .npy .npz .parquet .pkl .pt .tar .tgz .xz .zip .zst
"""

TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
TEXT_NAMES = frozenset(_TEXT_NAMES.split())
JSONL_SUFFIXES = frozenset((".jsonl", ".ndjson"))
IGNORED_DIRECTORIES = frozenset(_IGNORED_DIRECTORIES.split())
UNREADABLE_SUFFIXES = frozenset(_UNREADABLE_SUFFIXES.split())


def looks_like_text(name: str) -> bool:
    """True for names that are taken from a directory when no pattern is given."""
    suffix = Path(name).suffix.lower()
    return name in TEXT_NAMES or suffix in TEXT_SUFFIXES or suffix in JSONL_SUFFIXES
