"""Pieces of a report's page: style, tables, pictures. The caller escapes text from data."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from cast.ground.optional import require

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 64rem; margin: 2rem auto;
       padding: 0 1rem }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 2.8rem } h3 { margin: 1.6rem 0 .6rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left } tr.cast td { font-weight: 600 }
td small, th small { color: #666; font-weight: 400; white-space: nowrap }
.pair { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start } svg { max-width: 100%; height: auto }
.clip { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; margin: 1.4rem 0; align-items: center }
.clip img { max-width: 100% } .small { image-rendering: pixelated }
.clip td, .clip th { padding: .1rem .6rem; font-size: .9rem; text-align: left; border: 0 }
.right { color: #00703c } .wrong { color: #b3261e } .lead { font-size: 1.15rem } .note { color: #555 }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 }
.tile { border: 1px solid #ddd; border-radius: .5rem; padding: .6rem 1rem; min-width: 7.5rem }
.tile b { display: block; font-size: 1.6rem; line-height: 1.25; font-variant-numeric: tabular-nums }
.tile span { color: #555; font-size: .9rem } .wide { overflow-x: auto }
details { margin: 1rem 0 } summary { cursor: pointer; color: #0b57d0 } table.left td, table.left th,
table.names td:nth-child(2), table.names th:nth-child(2) { text-align: left }
code { overflow-wrap: anywhere }
"""


def page(title: str, body: str) -> str:
    """A whole document; `body` is HTML, `title` text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def table(head: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]], kind: str = "") -> str:
    """Rows are (class, cells); cells are HTML. `kind` is a class of the table."""
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    lines = [f'<div class="wide"><table class="{kind}"><tr>{cells}</tr>']
    lines += [f'<tr class="{name}">' + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for name, row in rows]
    return "\n".join([*lines, "</table></div>"])


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values, both text."""
    lines = "\n".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="wide"><table class="left">{lines}</table></div>'


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """Large figures with a word each; both text."""
    items = (f'<div class="tile"><b>{escape(figure)}</b><span>{escape(name)}</span></div>' for name, figure in figures)
    return f'<div class="tiles">{"".join(items)}</div>'


def verdict(word: str, right: bool) -> str:
    """A guess, marked right or wrong by colour and by sign."""
    return f'<span class="{"right" if right else "wrong"}">{escape(word)} {"✓" if right else "✗"}</span>'


def strip(frames: Sequence[np.ndarray], alt: str, height: int = 84, width: int = 540) -> str:
    """Frames, uint8 [H, W, 3] each and equally large, side by side as one picture at most `width` pixels wide."""
    image = require("PIL.Image", "report")
    row = np.concatenate(frames, axis=1)
    scale = min(height / row.shape[0], width / row.shape[1])
    picture, small = image.fromarray(row), scale >= 1
    if not small:
        # Twice the displayed size, for sharp screens.
        factor = min(1.0, 2 * scale)
        picture = picture.resize((round(row.shape[1] * factor), round(row.shape[0] * factor)), image.LANCZOS)
    size = f'width="{round(row.shape[1] * scale)}"'
    return f'<img class="{"small" if small else ""}" {size} src="{_data_uri(picture, small)}" alt="{escape(alt)}">'


def _data_uri(picture: Any, lossless: bool) -> str:
    file = io.BytesIO()
    if lossless:
        picture.save(file, format="PNG")
    else:
        picture.save(file, format="JPEG", quality=85)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()
