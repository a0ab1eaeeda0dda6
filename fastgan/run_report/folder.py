"""Files of a run directory, which may be anybody's: regular, bounded, inside of it."""

import os
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from fastgan.errors import shown

_MOST_NAMES = 100_000


@dataclass
class RunFolder:
    """Reads below `path`; what there is but cannot be read goes into `notes`, a line each."""

    path: Path
    notes: list[str] = field(default_factory=list)

    def read(self, name: str, most: int) -> bytes | None:
        """A file's content, at most `most` bytes; None where it is absent, or noted."""
        file = self.path / name
        if not os.path.lexists(file):
            return None
        try:
            self._check_inside(name)
            if not file.is_file():  # a pipe would keep us waiting
                raise ValueError("no file")
            with file.open("rb") as opened:
                content = opened.read(most + 1)
            if len(content) > most:
                raise ValueError(f"more than {most} bytes")
        except (OSError, ValueError) as error:
            self.note(name, error)
            return None
        return content

    def names(self, name: str) -> list[str]:
        """What a folder of the run holds, sorted; nothing where it is absent, or noted."""
        if not os.path.lexists(self.path / name):
            return []
        try:
            self._check_inside(name)
            with os.scandir(self.path / name) as entries:
                return sorted(entry.name for entry in islice(entries, _MOST_NAMES))
        except (OSError, ValueError) as error:
            self.note(name, error)
            return []

    def inside(self, name: str) -> bool:
        """Whether the name, with all links followed, still lies in the run directory."""
        return Path(os.path.realpath(self.path / name)).is_relative_to(os.path.realpath(self.path))

    def note(self, name: str, error: Exception) -> None:
        """Says that a file was left out, and why."""
        why = error.strerror if isinstance(error, OSError) else error
        self.notes.append(f"left out: {shown(name)}, {shown(str(why), 200)}")

    def _check_inside(self, name: str) -> None:
        if not self.inside(name):
            raise ValueError("a link out of the run directory")
