"""Shapes and words as SVG on a white ground; equal drawings give equal bytes."""

from __future__ import annotations

from html import escape

INK, FAINT, PAPER = "#212529", "#868e96", "#ffffff"
_FONT = "font-family='system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif'"


class Picture:
    """Collects shapes; coordinates are pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._head = (
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
            f"viewBox='0 0 {width} {height}' role='img' aria-label='{escape(title, quote=True)}' {_FONT}>"
        )
        self._parts: list[str] = []
        self.box(0, 0, width, height, PAPER)

    def box(self, x: float, y: float, width: float, height: float, fill: str, line: str = "none") -> None:
        """A rectangle."""
        edge = "" if line == "none" else f" stroke='{line}'"
        self._parts.append(f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' fill='{fill}'{edge}/>")

    def define(self, name: str, steps: str, line: str, width: float) -> None:
        """Define a path for `repeat`."""
        self._parts.append(f"<defs><path id='{name}' d='{steps}' stroke='{line}' stroke-width='{width:g}'/></defs>")

    def repeat(self, name: str, x: float, y: float) -> None:
        """Draw the defined path, moved by x and y."""
        self._parts.append(f"<use href='#{name}' x='{x:g}' y='{y:g}'/>")

    def words(self, x: float, y: float, text: str, fill: str = INK, size: int = 13, style: str = "") -> None:
        """A line of text from x to the right, on the base line y; `style` has further SVG attributes."""
        more = f" {style}" if style else ""
        self._parts.append(f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{fill}'{more}>{escape(text)}</text>")

    def text(self) -> str:
        """The SVG file's text."""
        return "\n".join([self._head, *self._parts, "</svg>", ""])
