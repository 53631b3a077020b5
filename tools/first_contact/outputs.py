"""The folder that comes back: few files of a bounded size, whole at every moment, whatever the disk does."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

#: The most of one file that comes back is 16 MiB.
LIMIT = 15 << 20
#: A new text is written here before it takes its file's place.
_PART = "part"


class Outputs:
    """Writes files; a disk that is full costs what did not fit, never the run.

    Args:
        folder: made if it is not there.
        limit: bytes of one file.

    Raises:
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit
        #: File -> why it does not hold everything.
        self.cut: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _PART).write_text("")
        (folder / _PART).unlink()

    def append(self, name: str, text: str) -> None:
        """Add whole lines, or nothing of them."""
        path, data = self.folder / name, text.encode(errors="replace")
        before = path.stat().st_size if path.exists() else 0
        if before + len(data) > self.limit:
            self.cut[name] = f"more than {self.limit} bytes"
            return
        try:
            with path.open("ab") as file:
                file.write(data)
        except OSError as error:
            self.cut[name] = str(error)
            _shorten(path, before)

    def replace(self, name: str, text: str) -> None:
        """Give the file this text; the one before stays where that fails."""
        part, data = self.folder / _PART, text.encode(errors="replace")
        if len(data) > self.limit:
            self.cut[name] = f"more than {self.limit} bytes"
            data = data[: self.limit]
        try:
            part.write_bytes(data)
            os.replace(part, self.folder / name)
        except OSError as error:
            self.cut[name] = str(error)
            with contextlib.suppress(OSError):
                part.unlink()


def _shorten(path: Path, size: int) -> None:
    """Take away the part of a line that a full disk still took."""
    with contextlib.suppress(OSError):
        os.truncate(path, size)
