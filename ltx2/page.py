"""One HTML page of what a check found: tables, charts, pictures; it loads nothing."""

import base64
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from .base import cell
from .media import PathLike, png, system_errors, workspace

WIDTH, HEIGHT, EDGE = 240, 60, 5  # of a chart
STYLE = """
body { background: #fff; color: #1d1d1f; max-width: 1320px; margin: 2em auto;
  padding: 0 1em; font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin: 2em 0 .5em }
h1, p { overflow-wrap: anywhere } p, figcaption { color: #6b6b70 }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 2px 10px; text-align: left; border-bottom: 1px solid #e3e3e6 }
th { background: #fff; position: sticky; top: 0 } .number { text-align: right }
.marked td { background: #fde9e7; color: #c62828; font-weight: 600 }
div { display: flex; flex-wrap: wrap; align-items: start; gap: 12px 20px } figure { margin: 0 }
figcaption { font-size: 12px } img { max-width: 100%; height: auto; display: block }
svg { display: block; border: 1px solid #e3e3e6 } svg + figcaption { width: 240px }
polyline { fill: none; stroke: #0a63c9; stroke-width: 1.5; stroke-linecap: round }
polyline + polyline { stroke: #b45309; stroke-dasharray: 4 3 }
polygon { fill: #0a63c9; stroke: #0a63c9; opacity: .18 } circle { fill: #c62828 }
"""


def write(path: PathLike, title: str, parts: Iterable[str]) -> None:
    """Write a page of parts, which the functions below make."""
    head = f'<meta charset="utf-8" /><title>{escape(title)}</title>'
    head += f"<style>{STYLE}</style>"
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    text = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
    with workspace(path) as folder, system_errors(f"{path}: cannot be written"):
        Path(folder, "new").write_text(text, "utf-8")


def section(head: str, text: str, parts: Iterable[str]) -> str:
    """Parts side by side below a heading and a sentence."""
    top = f"<h2>{escape(head)}</h2>" + f"<p>{escape(text)}</p>" * bool(text)
    return "\n".join([top, "<div>", *parts, "</div>"])


def table(heads: Sequence[str], rows: Sequence, marked: Collection[int] = ()) -> str:
    """The same as `base.table`, with some rows, given by number, highlighted."""

    def line(tag: str, cells: Sequence, kinds: Sequence) -> str:
        style = (" class='number'" * (not isinstance(x, str)) for x in kinds)
        pairs = zip(map(cell, cells), style)
        return "".join(f"<{tag}{s}>{escape(x)}</{tag}>" for x, s in pairs)

    lines = [f"<tr>{line('th', heads, rows[0] if rows else heads)}</tr>"]
    for n, row in enumerate(rows):
        style = " class='marked'" * (n in marked)
        lines.append(f"<tr{style}>{line('td', row, row)}</tr>")
    return "\n".join(["<table>", *lines, "</table>"])


def picture(image: np.ndarray, caption: str) -> str:
    """A picture (H, W, 3) uint8."""
    data, text = base64.b64encode(png(image)).decode(), escape(caption)
    image = f'<img alt="{text}" src="data:image/png;base64,{data}" />'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def chart(
    caption: str,
    lines: Sequence[Sequence[float]],
    bands: Sequence[tuple[Sequence[float], Sequence[float]]] = (),
    marks: Mapping[int, str] = {},
) -> str:
    """A sparkline: lines (the second one dashed), areas between pairs of lines, marks
    with texts by place. Values above 1 are logarithmic, infinite ones left out."""
    curves = [*lines, *(curve for band in bands for curve in band)]
    values = [math.asinh(v) for c in curves for v in c if math.isfinite(v)]
    values += [0.0] * (not (bands and values))
    low, high = min(values), max(values)
    step = (WIDTH - 2 * EDGE) / max(len(lines[0]) - 1, 1)

    def place(i: int, value: float) -> tuple[float, float]:
        value = (math.asinh(value) - low) / (high - low or 1)
        return EDGE + i * step, HEIGHT - EDGE - value * (HEIGHT - 2 * EDGE)

    def points(curve: Iterable[tuple[int, float]]) -> str:
        places = (place(i, v) for i, v in curve if math.isfinite(v))
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)

    shapes = []
    for lower, upper in bands:
        around = [*enumerate(lower), *reversed([*enumerate(upper)])]
        shapes.append(f'<polygon points="{points(around)}" />')
    shapes += [f'<polyline points="{points(enumerate(line))}" />' for line in lines]
    for i, text in marks.items():
        value = lines[0][i] if math.isfinite(lines[0][i]) else math.sinh(high)
        x, y = place(i, value)
        tip = f"<title>{escape(text)}</title>"
        shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5">{tip}</circle>')
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    text = escape(caption)
    svg = f'<svg role="img" aria-label="{text}" {size}>{"".join(shapes)}</svg>'
    return f"<figure>{svg}<figcaption>{text}</figcaption></figure>"
