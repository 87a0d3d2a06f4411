"""A plan as an SVG: one box a visit from the embedding down to the LM head, what the terminal shows as a table.

The picture stands alone, follows the reader's light or dark mode and fits a phone. Loops are frames, the span is
shaded, and every state that an edge carries is a lane on the right: from the visit that leaves it to the ports that
read it, dashed where it goes to the next token.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from undertow.analysis.show import Row, block_name, model_of, picture
from undertow.edges import Edge
from undertow.model import UndertowForCausalLM
from undertow.plan import EMBED
from undertow.recipe import Recipe

__all__ = ["svg"]

LEFT, RIGHT, LANE, LINE, GAP, INDENT = 46, 306, 26, 15, 10, 8  # of the boxes, between lanes, of text, between boxes
LIGHT = {
    "paper": "#ffffff", "ink": "#1f2328", "dim": "#59636e", "edge": "#8c959f", "box": "#f6f8fa", "span": "#ddf4ff",
    "lane0": "#0969da", "lane1": "#bc4c00", "lane2": "#8250df", "lane3": "#1a7f37",
}  # fmt: skip
DARK = {
    "paper": "#0d1117", "ink": "#e6edf3", "dim": "#9198a1", "edge": "#656c76", "box": "#161b22", "span": "#122d42",
    "lane0": "#58a6ff", "lane1": "#f0883e", "lane2": "#bc8cff", "lane3": "#3fb950",
}  # fmt: skip


@dataclass(frozen=True)
class Lane:
    """One state that edges carry: where it comes from, whether to the next token, and who reads it."""

    number: int
    source: int  # row
    delay: int
    said: str  # for the legend
    edges: tuple[Edge, ...]

    @property
    def style(self) -> str:
        return f"lane{self.number % 4}"


def svg(target: UndertowForCausalLM | Recipe | str | Path) -> str:
    """The plan of a model, a recipe or a recipe's file as the text of an SVG.

    Raises:
        ValueError: a recipe that cannot be loaded.
        FileNotFoundError: no such file.
    """
    name, model, _ = model_of(target, None)
    rows = picture(model)
    lanes = _lanes(model, rows)
    places: list[tuple[float, float]] = []
    y = 34.0
    for row in rows:
        lines = max(_lines(row), sum(1 for _ in _reads(lanes, row)) + sum(lane.source == len(places) for lane in lanes))
        height = LINE * lines + 8 if _boxed(row) else 14 if row.loop else 4
        places.append((y, height))
        y += height + GAP
    width = RIGHT + 14 + LANE * max(len(lanes), 1)
    legend = [line for lane in lanes for line in _legend(lane, width)]
    bottom = y + 13 * len(legend) + (10 if legend else 0)
    parts = [
        *_spans(rows, places, width),
        *_loops(rows, places),
        *_stream(rows, places),
        *(part for n, row in enumerate(rows) if _boxed(row) for part in _box(row, n, places[n], lanes, rows)),
        *(part for lane in lanes for part in _wire(lane, lanes, rows, places)),
        *(_text(10, y + 13 * n + 8, line, f"small {style}") for n, (style, line) in enumerate(legend)),
    ]
    title = escape(f"{name}: the plan, from the embedding to the LM head")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="undertow-plan" viewBox="0 0 {width} {bottom:.0f}" '
            f'role="img" aria-label="{title}">',
            f"<style>{_style()}</style>",
            f'<rect class="paper" width="{width}" height="{bottom:.0f}" rx="6"/>',
            _text(10, 20, _cut(name, 40), "ink name"),
            *parts,
            "</svg>",
        ]
    )


def _style() -> str:
    def colours(of: dict[str, str]) -> str:
        marks = "".join(
            f".undertow-plan .{n}{{fill:{c}}}.undertow-plan .{n}-line{{stroke:{c};fill:none}}" for n, c in of.items()
        )
        return marks + f".undertow-plan .frame{{stroke:{of['edge']};fill:none}}"

    font = ".undertow-plan text{font:11px system-ui,sans-serif}.undertow-plan .name{font-size:12.5px;font-weight:600}"
    font += ".undertow-plan .small{font-size:10px}"
    return f"{font}{colours(LIGHT)}@media(prefers-color-scheme:dark){{{colours(DARK)}}}"


# ---------------------------------------------------------------------- what there is to draw


def _boxed(row: Row) -> bool:
    """Whether the row is something that runs, not the border of a loop."""
    return bool(row.steps) or not (row.loop or _closes(row))


def _closes(row: Row) -> bool:
    return not row.steps and row.drawn.endswith("╰")


def _depth(row: Row) -> int:
    """How many loops are around it."""
    return row.drawn.count("│")


def _name(row: Row) -> str:
    return row.drawn.lstrip("│ ")


def _info(row: Row) -> list[str]:
    """The small print of a box: which visits, where keys and values lie, registers."""
    if not row.steps:
        return []
    visit = f"visit {row.numbers}" + (f" · slot {row.slots}" if row.slots else "")
    return [visit, *([row.stream] if row.stream else [])]


def _lines(row: Row) -> int:
    return 1 + len(_info(row))


def _lanes(model: UndertowForCausalLM, rows: Sequence[Row]) -> list[Lane]:
    steps = model.program.steps
    row_of = {step.index: n for n, row in enumerate(rows) for step in row.steps}
    carried: dict[tuple, list[tuple[int, Edge]]] = {}
    for step in steps:
        for edge in (edge for edges in step.edges.values() for edge in edges):
            carried.setdefault((edge.memory, edge.delay), []).append((step.index, edge))
    made: list[Lane] = []
    for (memory, delay), entering in sorted(carried.items(), key=lambda item: -item[0][1]):
        source, norm, carry = memory
        before = len(steps) if delay else entering[0][0]
        last = max((step.index for step in steps if step.block == source and step.index < before), default=None)
        edges = tuple(dict.fromkeys(edge for _, edge in entering))
        state = f"RMS norm of out({block_name(source)})" if norm else f"out({block_name(source)})"
        said = f"memory {model.program.memories.index(memory)}: {state}, read by the next token" if delay else state
        said += f", updated by {type(model.undertow[carry]).__name__}" if carry else ""
        through = ", ".join(dict.fromkeys(edge.project for edge in edges if edge.project))
        mixers = ", ".join(dict.fromkeys(type(model.undertow[edge.mixer]).__name__ for edge in edges))
        said += (f", through {through}" if through else "") + f"; mixed in by {mixers}"
        row = 0 if source == EMBED or last is None else row_of[last]
        made.append(Lane(len(made), row, delay, said, edges))
    return made


def _reads(lanes: Sequence[Lane], row: Row) -> Iterator[tuple[Lane, str]]:
    """The lanes a row reads, and at which ports: `key, value`; which of its visits do, if not all."""
    for lane in lanes:
        at: dict[tuple[int, ...], list[str]] = {}
        for port in dict.fromkeys(edge.port for edge in lane.edges):
            there = [n for n, step in enumerate(row.steps, 1) if set(step.edges.get(port, ())) & set(lane.edges)]
            if there:
                at.setdefault(tuple(there), []).append(port)
        for numbers, ports in at.items():
            said = ", ".join(str(n) for n in numbers) if len(numbers) < 4 else f"{numbers[0]}..{numbers[-1]}"
            only = "" if len(numbers) == len(row.steps) else f" (visit {said} of {len(row.steps)})"
            yield lane, ", ".join(ports) + only


def _legend(lane: Lane, width: int) -> list[tuple[str, str]]:
    lines = textwrap.wrap(lane.said, (width - 30) * 10 // 54)
    return [(lane.style, ("● " if n == 0 else "   ") + line) for n, line in enumerate(lines)]


# ---------------------------------------------------------------------- how it is drawn


def _text(x: float, y: float, said: str, style: str, end: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}"{anchor}>{escape(said)}</text>'


def _cut(said: str, letters: int) -> str:
    return said if len(said) <= letters else f"{said[: letters - 1]}…"


def _spans(rows: Sequence[Row], places: Sequence[tuple[float, float]], width: int) -> Iterator[str]:
    """The span as a shaded band, and the name of each part where it begins."""
    inside = [place for row, place in zip(rows, places, strict=True) if "span" in row.part]
    if inside:
        top, bottom = inside[0][0] - 5, inside[-1][0] + inside[-1][1] + 5
        yield f'<rect class="span" x="4" y="{top:.1f}" width="{width - 8}" height="{bottom - top:.1f}" rx="6"/>'
    for n, row in enumerate(rows):
        if row.part and (n == 0 or rows[n - 1].part != row.part):
            yield _text(9, places[n][0] + 14, row.part.split("-")[0], "small dim")


def _loops(rows: Sequence[Row], places: Sequence[tuple[float, float]]) -> Iterator[str]:
    """A frame around each loop, with how often it runs."""
    open_at: list[int] = []
    for n, row in enumerate(rows):
        if row.loop and not row.steps:
            open_at.append(n)
        elif _closes(row):
            first = open_at.pop()
            x, top, right = LEFT - 2 + INDENT * len(open_at), places[first][0], RIGHT + 6 - 2 * len(open_at)
            height = places[n][0] + places[n][1] - top
            frame = f'x="{x}" y="{top:.1f}" width="{right - x}" height="{height:.1f}" rx="7"'
            yield f'<rect class="frame" stroke-dasharray="2 3" {frame}/>'
            yield _text(x + 8, top + 13, f"↻ {rows[first].loop}", "small dim")


def _stream(rows: Sequence[Row], places: Sequence[tuple[float, float]]) -> Iterator[str]:
    """The residual stream from box to box."""
    boxes = [place for row, place in zip(rows, places, strict=True) if _boxed(row)]
    for (y, height), (below, _) in zip(boxes, boxes[1:], strict=False):
        end, x = below - 1, LEFT + 84
        yield f'<path class="edge-line" d="M{x} {y + height:.1f}V{end:.1f}m-3 -4l3 4l3 -4"/>'


def _box(row: Row, number: int, place: tuple[float, float], lanes: Sequence[Lane], rows) -> Iterator[str]:
    (y, height), x = place, LEFT + INDENT * _depth(row)
    tips = escape("; ".join([_name(row), *row.edges]))
    at = f'x="{x}" y="{y:.1f}" width="{RIGHT - x}" height="{height}" rx="5"'
    yield f'<g><title>{tips}</title><rect class="box" {at}/><rect class="frame" {at}/>'
    yield _text(x + 8, y + 16, _cut(_name(row), 34), "ink name")
    for n, line in enumerate(_info(row), 1):
        yield _text(x + 8, y + 15 + LINE * n, _cut(line, 36), "small dim")
    for n, (style, said, _) in enumerate(_ports(row, number, lanes)):
        yield _text(RIGHT - 8, y + 15 + LINE * n, said, f"small {style}", end=True)
    yield "</g>"


def _ports(row: Row, number: int, lanes: Sequence[Lane]) -> Iterator[tuple[str, str, Lane]]:
    """What stands at the right edge of a box, from above: what it reads, then what it leaves."""
    for lane, said in _reads(lanes, row):
        yield lane.style, f"{said} ◂", lane
    for lane in lanes:
        if lane.source == number:
            yield lane.style, "leaves ▸" if lane.delay else "gives ▸", lane


def _wire(lane: Lane, lanes: Sequence[Lane], rows: Sequence[Row], places) -> Iterator[str]:
    """The lane itself, its taps, and a pill that says to which token it goes."""
    x, dash, at = RIGHT + 18 + LANE * lane.number, ' stroke-dasharray="5 3"' if lane.delay else "", {}
    for n, row in enumerate(rows):
        for line, (_, said, other) in enumerate(_ports(row, n, lanes)):
            if other is lane:
                at[places[n][0] + 11 + LINE * line] = said.endswith("▸")
    path = f"M{x} {min(at):.1f}V{max(at):.1f}"
    for y, leaves in at.items():
        path += f"M{RIGHT} {y:.1f}H{x}" + ("" if leaves else f"M{RIGHT + 6} {y - 3:.1f}L{RIGHT + 1} {y:.1f}l5 3")
    yield f'<path class="{lane.style}-line" stroke-width="1.5"{dash} d="{path}"/>'
    y = next(y for y, leaves in at.items() if leaves)
    yield f'<rect class="{lane.style}" x="{x - 12}" y="{y - 7:.1f}" width="24" height="14" rx="7"/>'
    said = "t−1" if lane.delay else "t"
    yield f'<text x="{x}" y="{y + 4:.1f}" class="small paper" text-anchor="middle">{said}</text>'
