"""The output folder: few files of bounded size, whole at every moment, even on a full disk."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

#: The largest file that can be copied back is 16 MiB.
LIMIT = 15 << 20
#: A new text is written under this name, then renamed.
_PART = "part"


class Outputs:
    """Writes files. On a full disk the run continues without the text that did not fit.

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
        """Append whole lines or nothing."""
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
        """Replace the file's text; on an error the earlier text stays."""
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
    """Remove the part of a line that a full disk still took."""
    with contextlib.suppress(OSError):
        os.truncate(path, size)
