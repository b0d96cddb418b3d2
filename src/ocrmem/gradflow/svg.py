"""The path as a picture: boxes from top to bottom in the order of the forward, the break marked."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

from ocrmem.gradflow.explain import Explanation
from ocrmem.gradflow.path import Carries, Station, stations
from ocrmem.gradflow.report import GradientReport

WIDTH, BOX_X, BOX_WIDTH, NOTE_X, NOTE_WIDTH = 980, 40, 500, 600, 340
GAP, MAX_NESTED = 30, 9
GREEN, RED, GREY, AMBER = "#1a7f37", "#cf222e", "#8c959f", "#9a6700"
COLOUR: dict[Carries, str] = {"yes": GREEN, "zero": AMBER, "no": RED, "not needed": GREY}
SANS = "font-family=\"Inter, 'Segoe UI', 'DejaVu Sans', sans-serif\""
MONO = "font-family=\"'JetBrains Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace\""


@dataclass(frozen=True)
class _Box:
    """A station at the top level with those nested in it."""

    head: Station
    nested: tuple[Station, ...]
    top: int

    @property
    def height(self) -> int:
        return 44 + (20 if _detail(self.head) else 0) + 19 * len(self.nested) + (8 if self.nested else 0)

    @property
    def break_y(self) -> int | None:
        """Where the break is inside this box."""
        for index, station in enumerate(self.nested):
            if station.is_break:
                return self.top + 44 + (20 if _detail(self.head) else 0) + 19 * index + 6
        return self.top + 24 if self.head.is_break else None


def draw_path(report: GradientReport, explanation: Explanation, *, numbers: bool = True) -> str:
    """An SVG of the way from the trainable part to the loss.

    Args:
        numbers: show the loss and gradient norms.
    """
    header, top = _header(report, explanation)
    boxes = _boxes(stations(report, explanation, numbers=numbers), top)
    parts = [header]
    for above, below in pairwise(boxes):
        parts.append(_connector(above, below))
    parts += [_box(box) for box in boxes]
    target = next((box for box in boxes if box.break_y is not None), None)
    healthy_at = next((box for box in boxes if box.head.is_trainable), boxes[0])
    anchor = healthy_at.top + 24 if target is None or target.break_y is None else target.break_y
    note, note_bottom = _note(explanation, anchor, earliest=top)
    parts.append(note)
    bottom = max(boxes[-1].top + boxes[-1].height, note_bottom) + 24
    parts.append(_legend(bottom))
    return _document("\n".join(parts), bottom + 44)


def _boxes(found: list[Station], top: int) -> list[_Box]:
    groups: list[tuple[Station, list[Station]]] = []
    for station in found:
        if station.depth == 0 or not groups:
            groups.append((station, []))
        else:
            groups[-1][1].append(station)
    boxes = []
    for head, nested in groups:
        boxes.append(_Box(head, tuple(_few(nested)), top))
        top += boxes[-1].height + GAP
    return boxes


def _few(nested: list[Station]) -> list[Station]:
    """As many as fit; the break is always among them."""
    if len(nested) <= MAX_NESTED:
        return nested
    at = next((index for index, station in enumerate(nested) if station.is_break), 0)
    start = max(0, min(at - MAX_NESTED // 2, len(nested) - MAX_NESTED))
    return nested[start : start + MAX_NESTED]


def _header(report: GradientReport, explanation: Explanation) -> tuple[str, int]:
    colour = _verdict_colour(explanation)
    label = explanation.verdict if explanation.cause is None else f"{explanation.verdict}: {explanation.cause}"
    learner = ", ".join(report.trainable) or report.model
    pill = 24 + round(8.7 * len(label))
    lines = textwrap.wrap(explanation.sentence, 112)
    parts = [
        f'<rect x="{BOX_X}" y="28" width="{pill}" height="28" rx="14" fill="{colour}"/>',
        _text(BOX_X + 12, 47, label, size=14, colour="#ffffff", bold=True),
        _text(BOX_X + pill + 14, 47, f"gradient of {learner}" if learner else "", size=14, colour="#57606a"),
    ]
    parts += [_text(BOX_X, 84 + 20 * index, line, size=14) for index, line in enumerate(lines)]
    return "\n".join(parts), 84 + 20 * len(lines) + 12


def _box(box: _Box) -> str:
    head, colour = box.head, COLOUR[box.head.carries]
    dash = ' stroke-dasharray="5 4"' if head.carries == "not needed" else ""
    fill = {"yes": "#f6fff8", "zero": "#fffbf0", "no": "#fff7f7", "not needed": "#fbfcfd"}[head.carries]
    width = 2.5 if head.is_trainable or head.is_break else 1.5
    parts = [
        f'<rect x="{BOX_X}" y="{box.top}" width="{BOX_WIDTH}" height="{box.height}" rx="10" fill="{fill}" '
        f'stroke="{colour}" stroke-width="{width}"{dash}/>',
        _symbol(BOX_X + 22, box.top + 22, head.carries),
        _text(BOX_X + 42, box.top + 27, _cut(head.name, 34), size=15, bold=True),
        _text(BOX_X + BOX_WIDTH - 16, box.top + 27, _cut(head.kind, 26), size=12, colour="#57606a", anchor="end"),
    ]
    y = box.top + 46
    if _detail(head):
        parts.append(_text(BOX_X + 42, y, _cut(_detail(head), 60), size=11.5, colour="#57606a", mono=True))
        y += 20
    for station in box.nested:
        parts.append(_nested(station, y + 4))
        y += 19
    return "\n".join(parts)


def _detail(station: Station) -> str:
    """The second line of a box; an operation has only its place."""
    return station.detail or station.place


def _nested(station: Station, y: int) -> str:
    x = BOX_X + 42 + 16 * (station.depth - 1)
    colour = COLOUR[station.carries]
    name = station.name if not station.is_break else f"{station.name}  {station.place}"
    row = _text(
        x + 14,
        y,
        _cut(name, 56 - 2 * station.depth),
        size=11.5,
        mono=True,
        colour=colour if station.is_break else "#24292f",
    )
    kind = (
        ""
        if station.is_break
        else _text(BOX_X + BOX_WIDTH - 16, y, _cut(station.kind, 24), size=11, colour="#57606a", anchor="end")
    )
    return f'<circle cx="{x + 4}" cy="{y - 4}" r="3.5" fill="{colour}"/>{row}{kind}'


def _connector(above: _Box, below: _Box) -> str:
    x, start, end = BOX_X + 22, above.top + above.height, below.top
    colour, dash = GREY, ' stroke-dasharray="2 5"'
    if above.head.carries == "yes" and below.head.carries == "yes":
        colour, dash = GREEN, ""
    elif above.head.carries == "zero":
        colour, dash = AMBER, ' stroke-dasharray="6 5"'
    elif above.head.carries != "not needed" or below.head.carries == "no":
        colour, dash = RED, ' stroke-dasharray="6 5"'
    line = f'<line x1="{x}" y1="{start}" x2="{x}" y2="{end}" stroke="{colour}" stroke-width="2.5"{dash}/>'
    if colour == GREEN:
        middle = (start + end) // 2 - 4
        line += f'<path d="M{x - 6} {middle + 7} L{x} {middle - 3} L{x + 6} {middle + 7} Z" fill="{GREEN}"/>'
    return line


def _note(explanation: Explanation, anchor: int, *, earliest: int) -> tuple[str, int]:
    colour = _verdict_colour(explanation)
    rows: list[tuple[str, dict]] = []

    def add(text: str, columns: int, **style) -> None:
        rows.extend((line, style) for line in textwrap.wrap(text, columns) or [""])

    if explanation.healthy:
        add("the gradient arrives", 36, bold=True, colour=colour)
        add(explanation.sentence, 44)
    else:
        add("the break" if explanation.verdict != "undecided" else "not decided", 36, bold=True, colour=colour)
        if explanation.source is not None:
            add(str(explanation.source), 44, mono=True, colour="#57606a")
            add(explanation.source.text[:132], 44, mono=True)
        elif explanation.module:
            add(f"in {explanation.module}", 44, mono=True, colour="#57606a")
        add("mend", 36, bold=True, colour=GREEN)
        add(explanation.mend, 44)
    for warning in explanation.warnings:
        add(f"note: {warning.sentence}", 44, colour="#57606a")
    spaced = [0] * len(rows)
    for index, (_, style) in enumerate(rows[1:], start=1):
        spaced[index] = spaced[index - 1] + (8 if style.get("bold") else 0)
    height = 20 + 18 * len(rows) + spaced[-1]
    top = max(earliest, anchor - 24)
    parts = [
        f'<path d="M{BOX_X + BOX_WIDTH} {anchor} H{NOTE_X}" stroke="{colour}" stroke-width="1.5" fill="none"/>',
        f'<circle cx="{BOX_X + BOX_WIDTH}" cy="{anchor}" r="4.5" fill="{colour}"/>',
        f'<rect x="{NOTE_X}" y="{top}" width="{NOTE_WIDTH}" height="{height}" rx="10" fill="#ffffff" '
        f'stroke="{colour}"/>',
        f'<rect x="{NOTE_X}" y="{top}" width="5" height="{height}" rx="2.5" fill="{colour}"/>',
    ]
    for index, (line, style) in enumerate(rows):
        size = 11 if style.get("mono") else 12.5
        parts.append(_text(NOTE_X + 18, top + 23 + 18 * index + spaced[index], line, **{"size": size, **style}))
    return "\n".join(parts), top + height


def _legend(y: int) -> str:
    items: list[tuple[Carries, str]] = [
        ("yes", "carries the gradient"),
        ("zero", "carries only zeros"),
        ("no", "should carry it, and does not"),
        ("not needed", "needs none"),
    ]
    parts, x = [], BOX_X + 8
    for state, words in items:
        parts.append(_symbol(x, y + 8, state) + _text(x + 16, y + 12, words, size=12, colour="#57606a"))
        x += 40 + round(6.9 * len(words))
    parts.append(_text(WIDTH - 40, y + 12, "values go down, gradients go up", size=12, colour="#57606a", anchor="end"))
    return "\n".join(parts)


def _symbol(x: int, y: int, state: Carries) -> str:
    colour = COLOUR[state]
    if state == "not needed":
        return f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>'
    mark = f"M{x - 4} {y} L{x - 1} {y + 3.5} L{x + 4.5} {y - 3.5}"
    if state == "zero":
        mark = f"M{x - 4} {y} H{x + 4}"
    elif state == "no":
        mark = f"M{x - 3.5} {y - 3.5} L{x + 3.5} {y + 3.5} M{x + 3.5} {y - 3.5} L{x - 3.5} {y + 3.5}"
    return (
        f'<circle cx="{x}" cy="{y}" r="9" fill="{colour}"/>'
        f'<path d="{mark}" stroke="#ffffff" stroke-width="2" fill="none" stroke-linecap="round" '
        'stroke-linejoin="round"/>'
    )


def _text(
    x: float, y: float, words: str, *, size: float = 14, colour: str = "#24292f", bold: bool = False,
    mono: bool = False, anchor: str = "start",
) -> str:  # fmt: skip
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" {MONO if mono else SANS} font-size="{size}" fill="{colour}"{weight} '
        f'text-anchor="{anchor}" xml:space="preserve">{escape(_printable(words))}</text>'
    )


def _printable(words: str) -> str:
    """XML takes no control characters."""
    return "".join(character if character.isprintable() else " " for character in words)


def _cut(words: str, columns: int) -> str:
    return words if len(words) <= columns else words[: columns - 1] + "…"


def _verdict_colour(explanation: Explanation) -> str:
    return {"healthy": GREEN, "undecided": AMBER}.get(explanation.verdict, RED)


def _document(body: str, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" '
        f'role="img">\n<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )
