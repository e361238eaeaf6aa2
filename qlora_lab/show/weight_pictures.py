"""The pictures of "Follow one weight": one for each station, as SVG that takes the ink of the page around it.

In: a OneWeight. Out: a Picture of each station, whose parts are drawn in a view box of WIDTH x HEIGHT.
Only the weight has a colour of its own, OURS; its constant has CONSTANT. All other ink is `currentColor`, so a picture
can be read in a light and in a dark theme.
"""

import html
from collections.abc import Iterable
from typing import NamedTuple

from matplotlib.colors import to_hex

from qlora_lab.measure.one_weight import OneWeight
from qlora_lab.show.figure import COLOURS

WIDTH, HEIGHT = 640, 200
TEXT = 15  # units: 12 px or more wherever the picture is at least 512 px wide
OURS = to_hex(COLOURS["red"])  # 3.9 : 1 on white, 4.8 : 1 on JupyterLab's dark ground: enough for marks, not for text
CONSTANT = to_hex(COLOURS["blue"])  # 5.2 : 1 on white, 3.7 : 1 on the dark ground
_TICKS = ((-1, "\N{MINUS SIGN}1"), (0, "0"), (1, "1"))
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
FAINT = 0.35  # opacity of what is only context


class Picture(NamedTuple):
    """Parts of an SVG, and where in it the weight is: the dot goes there."""

    parts: str
    mark: tuple[float, float]


def _text(x: float, y: float, said: str, anchor: str = "middle", size: float = TEXT, bold: bool = False) -> str:
    weight = ' font-weight="700"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size:g}"{weight}>{html.escape(said)}</text>'


def _cell(x: float, y: float, w: float, h: float, colour: str = "currentColor", opacity: float = 1) -> str:
    """Draw a filled rectangle."""
    place = f'x="{x:.4g}" y="{y:.4g}" width="{max(0, w):.4g}" height="{max(0, h):.4g}"'
    return f'<rect {place} fill="{colour}" fill-opacity="{opacity:.3g}"/>'


def _frame(x: float, y: float, w: float, h: float, colour: str = "currentColor") -> str:
    """Draw a rectangle with an edge; one in a colour of its own is tinted, too."""
    tint = 0 if colour == "currentColor" else 0.2  # the text in it keeps its contrast
    edge = f'fill-opacity="{tint}" stroke="{colour}" stroke-width="2"'
    return f'<rect x="{x:.4g}" y="{y:.4g}" width="{w:.4g}" height="{h:.4g}" fill="{colour}" {edge}/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = "currentColor", width: float = 1.5) -> str:
    ends = f'x1="{x1:.4g}" y1="{y1:.4g}" x2="{x2:.4g}" y2="{y2:.4g}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width:g}"/>'


def _dashed(*lines: str) -> str:
    return f'<g stroke-dasharray="6 4">{"".join(lines)}</g>'


def _arrow(x1: float, y: float, x2: float) -> str:
    """Draw a level arrow to the right."""
    return _line(x1, y, x2 - 6, y) + f'<path d="M{x2 - 9:g} {y - 5:g} L{x2:g} {y:g} L{x2 - 9:g} {y + 5:g}z"/>'


def _ring(x: float, y: float, colour: str = OURS) -> str:
    return f'<circle cx="{x:.4g}" cy="{y:.4g}" r="11" fill="none" stroke="{colour}" stroke-width="2.5"/>'


def number(value: float) -> str:
    """Write a number with four digits that count, as one reads it: a true minus sign, powers of ten."""
    digits, _, power = f"{value:#.4g}".partition("e")
    digits = digits.replace("-", "\N{MINUS SIGN}")
    return f"{digits} × 10{str(int(power)).translate(_RAISED)}" if power else digits


def _bits(x: float, y: float, value: int, count: int, ours: range, size: float = 44) -> str:
    """Draw the bits of `value`, the highest first; those whose place is in `ours` have the weight's colour."""
    parts = []
    for i in range(count):
        line = OURS if i in ours else "currentColor"
        parts.append(_frame(x + size * i, y, size - 4, size, line))
        parts.append(_text(x + size * i + (size - 4) / 2, y + size / 2 + 7, str(value >> (count - 1 - i) & 1), size=20))
    return "".join(parts)


def _boxes(y: float, *named: tuple[str, str], signs: str) -> str:
    """Draw a sum or a product: named numbers in a row, with a sign before each but the first."""
    step = WIDTH / len(named)
    parts = []
    for i, (name, said) in enumerate(named):
        centre = step * (i + 0.5)
        last = i == len(named) - 1
        line = OURS if last else "currentColor"
        parts += [_frame(centre - 68, y, 136, 48, line), _text(centre, y + 31, said, size=19)]
        parts.append(_text(centre, y + 72, name))
        if i:
            parts.append(_text(step * i, y + 32, signs[i - 1], size=24, bold=True))
    return "".join(parts)


def _bars(values: Iterable[float], x: float, base: float, width: float, high: float, ours: int | None = None) -> str:
    """Draw bars up and down from a base line, the largest of them `high` long."""
    values = list(values)
    most = max(map(abs, values), default=0) or 1  # a block of zeros has no bars
    step = width / len(values)
    parts = [_line(x, base, x + width, base, width=1)]
    for i, value in enumerate(values):
        length = abs(value) / most * high
        colour, opacity = (OURS, 1) if i == ours or ours is None else ("currentColor", FAINT)
        parts.append(_cell(x + step * (i + 0.15), base - length * (value > 0), step * 0.7, length, colour, opacity))
    return "".join(parts)


def _axis(scaled: float) -> float:
    """Place a scaled value, -1 to 1, on the axis of three pictures."""
    return WIDTH / 2 + scaled * 290


def _ends(y: float) -> str:
    marks = "".join(_line(_axis(v), y - 7, _axis(v), y + 7) + _text(_axis(v), y + 28, said) for v, said in _TICKS)
    return _line(_axis(-1), y, _axis(1), y) + marks


def weight(seen: OneWeight) -> Picture:
    rows, columns = seen.near.shape
    size = 24  # units: seven rows fill the height
    left = (WIDTH - size * columns) / 2
    top = (HEIGHT - size * rows) / 2
    shades = (seen.near.abs() / (seen.near.abs().max() or 1)).tolist()  # darker: larger magnitude
    parts = [
        _cell(left + size * x, top + size * y, size - 2, size - 2, opacity=0.06 + 0.5 * shades[y][x])
        for y in range(rows)
        for x in range(columns)
    ]
    # at an edge of the matrix the weight is not in the middle
    y, x = seen.near_place
    place = left + size * (x + 0.5) - 1, top + size * (y + 0.5) - 1
    return Picture("".join(parts) + _ring(*place), place)


def block(seen: OneWeight) -> Picture:
    values = seen.block_values.tolist()
    step = 600 / len(values)
    most = seen.absmax or 1  # a block of zeros
    # of two equal magnitudes the first is marked, as argmax finds it
    largest = int(seen.block_values.abs().argmax())
    sign = 1 if values[largest] >= 0 else -1
    y = 100 - sign * 80
    parts = _bars(values, 20, 100, 600, 80, seen.place)
    parts += _dashed(_line(20, y, 620, y, CONSTANT, 2)) + _ring(20 + step * (largest + 0.5), y, CONSTANT)
    # beside the line, on the side away from the bars, and at the end away from the ring
    x, anchor = (620, "end") if largest < len(values) / 2 else (20, "start")
    parts += _text(x, y - 6 if sign > 0 else y + 17, f"absmax {number(seen.absmax)}", anchor)
    return Picture(parts, (20 + step * (seen.place + 0.5), 100 - 80 * seen.value / most))


def scaled(seen: OneWeight) -> Picture:
    most = seen.absmax or 1
    # without a label: what matters is that none leaves the axis
    others = [_line(_axis(v / most), 88, _axis(v / most), 112, width=2) for v in seen.block_values.tolist()]
    parts = f'<g opacity="{FAINT}">{"".join(others)}</g>' + _ends(120)
    parts += _text(_axis(seen.scaled), 60, number(seen.scaled), size=19)
    return Picture(parts, (_axis(seen.scaled), 100))


def level(seen: OneWeight) -> Picture:
    ours = _axis(seen.level)
    low, high = map(_axis, seen.interval)
    # ticks lie over the tint, or the weight's own level would be hidden by it
    ticks = [_line(_axis(v), 70, _axis(v), 120, width=2) for v in seen.q.levels.tolist()]
    parts = _cell(low, 70, high - low, 50, OURS, 0.25) + "".join(ticks) + _ends(120)
    parts += _line(ours, 52, ours, 120, OURS, 4) + _text(ours, 42, f"level {number(seen.level)}", size=19)
    return Picture(parts, (_axis(seen.scaled), 95))


def code(seen: OneWeight) -> Picture:
    size = 38
    left = (WIDTH - 16 * size) / 2
    parts = []
    for i in range(16):
        line = OURS if i == seen.code else "currentColor"
        parts.append(_frame(left + size * i, 90, size - 4, size, line))
        parts.append(_text(left + size * (i + 0.5) - 2, 90 + size / 2 + 6, str(i), bold=i == seen.code))
    # two pixels less, as there are four between two cells
    centre = left + size * (seen.code + 0.5) - 2
    parts.append(_text(WIDTH / 2, 170, f"code {seen.code} stands for {number(seen.level)}"))
    return Picture("".join(parts), (centre, 66))


def nibble(seen: OneWeight) -> Picture:
    left = WIDTH / 2 - 86
    # binary is not everyone's: the sum says what each bit is worth
    sums = " + ".join(f"{bit}·{1 << i}" for i, bit in zip((3, 2, 1, 0), f"{seen.code:04b}", strict=True))
    parts = _bits(left, 76, seen.code, 4, range(4)) + _text(WIDTH / 2, 156, f"{sums} = {seen.code}")
    return Picture(parts, (WIDTH / 2, 50))


def byte(seen: OneWeight) -> Picture:
    left = WIDTH / 2 - 174
    # the first of two weights, an even number, lies in the high half, which is written first
    ours = range(4) if seen.high else range(4, 8)
    names = ["the weight", "its neighbour"] if seen.high else ["its neighbour", "the weight"]
    codes = [seen.code, seen.neighbour] if seen.high else [seen.neighbour, seen.code]
    parts = _bits(left, 70, seen.packed, 8, ours)
    for i, (name, value) in enumerate(zip(names, codes, strict=True)):
        parts += _text(left + 176 * i + 86, 142, f"{name}: code {value}")
    parts += _text(WIDTH / 2, 180, f"byte {seen.byte:,} = 0x{seen.packed:02X}", size=19)
    return Picture(parts, (left + (86 if seen.high else 262), 46))


def constant(seen: OneWeight) -> Picture:
    parts = _text(100, 52, "absmax, 32 bits") + _frame(30, 66, 140, 48, CONSTANT)
    parts += _text(100, 97, number(seen.absmax), size=19) + _arrow(182, 90, 222)
    parts += _text(320, 52, f"8 bits: code {seen.absmax_code}")
    # the weight stays where it is: its constant alone changes
    for i, bit in enumerate(f"{seen.absmax_code:08b}"):
        parts += _frame(234 + 22 * i, 72, 18, 36, CONSTANT) + _text(243 + 22 * i, 96, bit)
    parts += _arrow(418, 90, 458) + _text(540, 52, "read back") + _frame(470, 66, 140, 48, CONSTANT)
    parts += _text(540, 97, number(seen.absmax_stored), size=19)
    shared = f"group {seen.group} shares the scale {number(seen.absmax_scale)}; all share the mean"
    return Picture(parts + _text(WIDTH / 2, 165, f"{shared} {number(seen.absmax_offset)}"), (100, 128))


def decoded(seen: OneWeight) -> Picture:
    named = ("level", number(seen.level)), ("constant", number(seen.absmax_stored)), ("weight", number(seen.decoded))
    return Picture(_boxes(80, *named, signs="×="), (WIDTH * 5 / 6, 60))


def error(seen: OneWeight) -> Picture:
    # from the old value to the new one: a third of the picture, whatever the error is
    new = 430 if seen.error >= 0 else 210
    old = WIDTH - new
    parts = _line(40, 110, 600, 110) + _line(old, 110, new, 110, OURS, 5)
    parts += _line(old, 80, old, 120) + _line(new, 80, new, 120)
    parts += _text(old, 145, "before") + _text(old, 165, number(seen.value))
    parts += _text(new, 145, "after") + _text(new, 165, number(seen.decoded))
    return Picture(parts + _text(WIDTH / 2, 70, f"error {number(seen.error)}", size=19), (new, 110))


def product(seen: OneWeight) -> Picture:
    step = seen.step
    named = ("weight", number(seen.decoded)), ("activation", number(step.activation)), ("product", number(seen.product))
    said = f"one of {seen.q.shape[1]:,} products that add up to output {seen.row}: {number(step.output)}"
    return Picture(_boxes(60, *named, signs="×=") + _text(WIDTH / 2, 180, said), (WIDTH * 5 / 6, 42))


def adapter(seen: OneWeight) -> Picture:
    # where the weight lies in its matrix, as shares of its sides
    rows, columns = seen.q.shape
    x = 250 + 150 * (seen.column + 0.5) / columns
    y = 66 + 110 * (seen.row + 0.5) / rows
    parts = _frame(250, 66, 150, 110) + _frame(200, 66, 32, 110)
    parts += _frame(250, 22, 150, 28) + _text(216, 194, "B") + _text(416, 42, "A")
    parts += _line(200, y, 232, y, OURS, 4) + _line(x, 22, x, 50, OURS, 4)
    parts += _dashed(_line(232, y, x, y, OURS), _line(x, 50, x, y, OURS))
    parts += _text(430, 105, "frozen weight", "start") + _text(430, 125, number(seen.decoded), "start")
    parts += _text(430, 155, "correction", "start") + _text(430, 175, number(seen.step.correction), "start")
    return Picture(parts, (x, y))


def gradient(seen: OneWeight) -> Picture:
    step = seen.step
    parts = _frame(30, 76, 120, 48) + _text(90, 106, "frozen")
    parts += _text(90, 150, "no gradient")
    # each has its own scale: the gradients of A are smaller as long as B is
    parts += _bars(step.grad_B.tolist(), 220, 100, 180, 62) + _text(310, 190, f"B, row {seen.row}")
    parts += _bars(step.grad_A.tolist(), 440, 100, 180, 62) + _text(530, 190, f"A, column {seen.column}")
    return Picture(parts, (90, 60))


def page(seen: OneWeight) -> Picture:
    step = seen.step
    # at most 60 pages, four rows, around the one that matters: a large matrix has hundreds
    first = max(0, min(step.page - 30, step.page_count - 60))
    pages = range(first, min(step.page_count, first + 60))
    size = 38
    columns = min(15, len(pages))
    left = (WIDTH - size * columns) / 2
    top = 90 - size * -(-len(pages) // columns) / 2
    parts = []
    for i, number_ in enumerate(pages):
        x, y = left + size * (i % columns), top + size * (i // columns)
        ours = number_ == step.page
        parts.append(_frame(x, y, size - 5, size - 5))
        if number_ in step.resident:
            parts.append(_cell(x, y, size - 5, size - 5, opacity=0.3))
        if ours:
            mark = x + (size - 5) / 2, y + (size - 5) / 2
    parts.append(_ring(*mark))
    return Picture("".join(parts) + _text(WIDTH / 2, 190, "filled: in a frame; empty: in the file"), mark)
