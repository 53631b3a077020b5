"""Finished answers of a run, kept on disk until the run is complete.

Each process appends to its own file. A kill leaves at most one unfinished line, which is dropped. A run with another
number of processes finds the videos in any of the files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cast.evaluation.predictions import json_line
from cast.ground.files import write_text


class Parts:
    """The parts of one evaluation in a directory.

    Args:
        directory: has only the parts; made if needed.
        identity: model, data and settings of the evaluation; parts of another evaluation are an error.
        process: number of this process.
    """

    directory: Path
    identity: Any

    def __init__(self, directory: Path, identity: Mapping[str, Any], process: int) -> None:
        self.directory, self.identity = directory, json.loads(json.dumps(identity))
        self.own: Path = directory / f"process-{process:04d}.jsonl"

    def load(self) -> dict[str, dict[str, Any]]:
        """Finished records by video, of all processes. An unfinished line is removed from this process's file.

        Raises:
            ValueError: parts of another evaluation, or a damaged file.
        """
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.directory.glob("process-*.jsonl")):
            records = self._read(path)
            found |= {record["video"]: record for record in records}
            if path == self.own:
                write_text(path, "".join(map(json_line, [self.identity, *records])))
        return found

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add finished records; they survive a kill once this returns."""
        self.directory.mkdir(parents=True, exist_ok=True)
        new = not self.own.exists()
        with open(self.own, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(map(json_line, [*([self.identity] if new else []), *records]))

    def remove(self) -> None:
        """Delete all parts."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _read(self, path: Path) -> list[dict[str, Any]]:
        text = path.read_text(encoding="utf-8")
        lines = text.split("\n")[:-1]  # without an unfinished last line
        try:
            values = [json.loads(line) for line in lines]
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error}); remove {self.directory} to begin anew") from None
        if values and values[0] != self.identity:
            raise ValueError(
                f"{self.directory} holds the parts of another evaluation, {values[0]}; wanted is {self.identity}: "
                "choose another directory, or remove this one"
            )
        return values[1:]
