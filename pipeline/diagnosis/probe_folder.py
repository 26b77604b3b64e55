"""A folder of the checks' own within the run's, which is gone afterwards."""

import contextlib
import secrets
import shutil
from pathlib import Path

from model.errors import ConfigError
from pipeline.distributed.agreement import from_all, from_main, is_main

_PREFIX = ".doctor-"


class ProbeFolder:
    """Made by rank 0, with the folders above it that are not there yet; removed with them.

    Nothing else in the run's folder is read or changed, so a run may be going on in it.

    Args:
        run_dir: the run's folder.

    Attributes:
        path: of the folder.
    """

    def __init__(self, run_dir: Path) -> None:
        token = from_main(lambda: secrets.token_hex(8), OSError)
        self.path = run_dir / f"{_PREFIX}{token}"
        self._made: list[Path] = []

    def make(self) -> None:
        """Make it; a collective.

        Raises:
            ConfigError: the run's folder cannot be written.
        """
        from_main(self._make, ConfigError)

    def wait_for_all(self) -> None:
        """Until no rank needs it any more; a collective."""
        from_all(None)

    def remove_by_main(self) -> None:
        """Remove it, and what was made above it; the other ranks do nothing."""
        if is_main():
            self.remove()

    def remove(self) -> None:
        """Take everything away that was made here, as far as it goes."""
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in self._made:
            with contextlib.suppress(OSError):  # a run has begun in it meanwhile
                folder.rmdir()

    def _make(self) -> None:
        above = [self.path.parent, *self.path.parent.parents]
        self._made = [folder for folder in above if not folder.exists()]
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            self.remove()
            raise ConfigError(
                f"run.dir={self.path.parent} cannot be written on the node of rank 0 "
                f"({error.strerror or error}); make the folder writable, or set another run.dir"
            ) from error
