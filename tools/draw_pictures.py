"""Draw the documents' pictures: `python tools/draw_pictures.py [FOLDER]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]

from website import bytes as where_bytes_go  # noqa: E402
from website import windows  # noqa: E402

from cast_kernels import WINDOWS  # noqa: E402  after the path


def draw(folder: Path) -> None:
    """Write every picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for window in WINDOWS:
        (folder / f"window-{window}.svg").write_text(windows.draw(window))
    (folder / "bytes.svg").write_text(where_bytes_go.draw())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the pictures of the documents anew.")
    parser.add_argument(
        "folder", type=Path, nargs="?", default=ROOT / "docs/pictures", help="to write into (%(default)s)"
    )
    draw(parser.parse_args().folder)
