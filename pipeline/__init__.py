"""Training runs: configuration, engine, loop, checkpoints, export."""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

# Headway's other top-level packages. They lie beside this one, in a checkout and installed.
NEIGHBORS = ("foundation", "data_prep", "model")


def check_neighbors(home: Path) -> None:
    """Make sure that the packages this one needs are Headway's own.

    Their names are common ones. A folder `model` or a file `model.py` of somebody else that comes
    first on sys.path would give a ModuleNotFoundError about a part of it, or, with a module of the
    same name inside, an error that leads nowhere. Nothing is imported to find out.

    Args:
        home: the folder that holds Headway's packages.

    Raises:
        ImportError: Python finds something else under one of the names.
    """
    for name in NEIGHBORS:
        spec = find_spec(name)
        found = None
        if spec is not None:
            # A file's own path, or the first folder of a package without __init__.py.
            found = spec.origin or next(iter(spec.submodule_search_locations or ()), None)
        expected = home / name
        if found is None or Path(found).resolve() != expected / "__init__.py":
            raise ImportError(
                f"the package '{name}' is {found or 'not there'}, not Headway's own {expected}. "
                "If it comes from the current folder or PYTHONPATH, start the command from another "
                "folder or take it off PYTHONPATH; if another distribution installed it, install "
                "Headway into a virtual environment of its own"
            )


check_neighbors(Path(__file__).resolve().parent.parent)
