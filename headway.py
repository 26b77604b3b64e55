"""The console script `headway`, also `python -m headway`: finds Headway's packages, runs a command.

The one top-level module whose name nobody else is likely to have. It lies beside Headway's
packages, so it can tell whether the `pipeline` that Python finds is Headway's; that package then
looks at the others (`pipeline.check_neighbors`).
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; ends with the command's exit code."""
    expected = Path(__file__).resolve().parent / "pipeline" / "__init__.py"
    spec = find_spec("pipeline")
    found = spec.origin if spec is not None else None
    if found is None or Path(found).resolve() != expected:
        sys.exit(
            f"error: the package 'pipeline' is {found or 'not there'}, not Headway's own "
            f"{expected.parent}; take the other one off PYTHONPATH or uninstall it, or install "
            "Headway into a virtual environment of its own"
        )
    try:
        from pipeline import commands  # the package itself, imported first, looks at its neighbors
    except ImportError as error:
        sys.exit(f"error: {error}")
    sys.exit(commands.main())


if __name__ == "__main__":
    main()
