"""An explorer as a page of its own that plays in a browser: its states are drawn beforehand, so it needs no kernel.

In: an Explorer or a FollowWeight. Out: one HTML file of at most LIMIT bytes, unless the smallest page is larger, with
the controls, the pictures and the sentences that a kernel would give for the same states (playable.js shows them).

Not here: which states (grid.py), how pictures become small (frames.py).
"""

import base64
import hashlib
import html
import json
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anywidget
from tqdm.auto import tqdm

from qlora_lab.files.out_path import out_replacing
from qlora_lab.files.replace import replace_text
from qlora_lab.show.control import Control
from qlora_lab.show.figure import DARKER, IN_DETAIL
from qlora_lab.show.frames import ACROSS, TILE, Frames
from qlora_lab.show.grid import Grid, smallest
from qlora_lab.show.pane import Pane
from qlora_lab.show.slider import Button
from qlora_lab.show.source import called_functions, details_html, source_html
from qlora_lab.show.still import StatusLine

if TYPE_CHECKING:
    from qlora_lab.show.explorer import Explorer

LIMIT = 500_000  # bytes of a page
MOST = 700  # states of a page: half a minute of drawing, and a few MB of the reader's memory
MARK = '<meta name="generator" content="qlora_lab explorer">'  # so that save_html knows its own pages
SCRIPT = Path(__file__).with_suffix(".js")
BASE = set(anywidget.AnyWidget.class_trait_names(sync=True))  # fields that all widgets have
# light-dark() takes the side that color-scheme chooses: the reader's system, or the page around this one
_CSS = (
    """
:root { color-scheme: light dark; --jp-ui-font-color0: light-dark(#000, #fff);
        --jp-ui-font-color1: light-dark(#1f2328, #e6e6e6); --jp-layout-color0: light-dark(#fff, #121212);
        --jp-layout-color2: light-dark(#eee, #343b45); --jp-border-color1: light-dark(#777, #999);
        --jp-brand-color1: light-dark(#1976d2, #64b5f6);
        --jp-content-link-color: light-dark(#0b5cad, #82b9f5); --jp-ui-font-size1: 14px; }
:root[data-theme="light"] { color-scheme: light; }
:root[data-theme="dark"] { color-scheme: dark; }
body { margin: 0; padding: 8px; font: 14px/1.4 system-ui, sans-serif; box-sizing: border-box;
       color: var(--jp-ui-font-color1); background: var(--jp-layout-color0); }
.row { display: flex; flex-flow: row wrap; gap: 8px 24px; }
.beside { flex: 1 1 240px; min-width: 0; display: grid; gap: 0 24px; align-content: start; justify-items: stretch;
          grid-template-columns: repeat(auto-fill, minmax(min(220px, 100%), 1fr)); }
.beside .qlora-button { margin: 2px 0; }
.figure { flex: 3 1 600px; min-width: 0; }
.qlora-status { min-height: 1.4em; display: block !important; }
canvas { max-width: 100%; height: auto; background: #fff; }
.said { margin: 4px 0; }
.note { margin: 8px 0 0; font-size: 12px; }
code { font-size: 12px; }
summary { margin-top: 8px; }
"""
    + f"""@media screen {{
  :root[data-theme="dark"] canvas {{ filter: {DARKER}; }}
  @media (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) canvas {{ filter: {DARKER}; }} }}
}}
"""
)


class SavedPage(NamedTuple):
    """What save_html has written. stops: field -> how many values its control has there, and how many in a notebook.

    together: how many controls can differ from the start, at a time.
    """

    path: Path
    nbytes: int
    states: int
    stops: dict[str, tuple[int, int]]
    together: int


class Drawn:
    """The states of an explorer that are drawn by now: picture, sentence, line of code, and fields of its controls."""

    def __init__(self, explorer: "Explorer", progress: bool):
        self.explorer = explorer
        self.controls: dict[str, Control] = explorer._controls
        self.start = tuple(getattr(control, control.moved) for control in self.controls.values())
        self.frames = Frames()
        self.texts: dict[tuple, tuple[str, str]] = {}  # state -> sentence, code
        self.fields: dict[tuple, list[dict]] = {}  # state -> fields of each control
        self._bar = tqdm(desc="drawing", unit="state", disable=not progress)

    def draw(self, states: Iterable[tuple]) -> None:
        """Draw what is not drawn yet, and leave the explorer as it was.

        A live view that shows the explorer sees nothing of it: messages to the page wait until all is as it was.
        """
        explorer = self.explorer
        with explorer._lock, ExitStack() as waiting:
            # the values at the end are those at the beginning, so a live page gets nothing new
            for control in (*self.controls.values(), *explorer._play):
                waiting.enter_context(control.hold_sync())
            explorer._paused = True
            try:
                for state in states:
                    if state not in self.frames:
                        self._draw(state)
            finally:
                self._set(self.start)
                explorer._paused = False
                explorer._redraw()

    def _set(self, state: tuple) -> None:
        for control, value in zip(self.controls.values(), state, strict=True):
            setattr(control, control.moved, value)

    def _draw(self, state: tuple) -> None:
        explorer = self.explorer
        self._set(state)
        values = explorer.state
        result = explorer.compute(values)
        explorer.update(result)
        self.frames.add(state, explorer._blit.pixels())
        self.texts[state] = explorer.describe(values, result), explorer.code()
        # update() of some explorers tells a control what to show: a page of bytes, or the levels to start from
        self.fields[state] = [_fields(control) for control in self.controls.values()]
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


def _fields(control: Control) -> dict:
    """Return the fields of a control that its module reads, but for the one that moves."""
    names = [name for name in control.keys if name not in BASE and name[0] != "_" and name != control.moved]
    return {name: getattr(control, name) for name in names}


def save_page(explorer: "Explorer", path: str | Path, progress: bool) -> SavedPage:
    """Write the page of an explorer (Explorer.save_html says how it is chosen)."""
    path = check_page_path(path)  # before half a minute of drawing
    drawn = Drawn(explorer, progress)
    try:
        grid, text = _fitted(drawn)
    finally:
        drawn.close()
    save_text(path, text)
    stops = {field: (len(grid.stops(i)), sum(map(len, grid.rounds[i]))) for i, field in enumerate(drawn.controls)}
    return SavedPage(path, _size(text), len(grid), stops, grid.together)


def save_text(path: str | Path, text: str) -> Path:
    """Write a page, whole or not at all, and return its path."""
    path = check_page_path(path)
    replace_text(path, text)
    return path


def _fitted(drawn: Drawn) -> tuple[Grid, str]:
    """Return the largest grid that fits, and its page.

    Sizes are predicted from those of smaller grids, because to measure one costs a second or two: a state beside many
    others shares more tiles with them, so that the prediction is rarely too small.
    """
    # even if it is too large: a page with fewer than three stops would show nothing
    played = _played(drawn.explorer)
    grid = smallest([control.rounds() for control in drawn.controls.values()], drawn.start, played)
    drawn.draw([drawn.start])
    fixed = _size(explorer_page(drawn, [drawn.start], grid))
    text = _page_of(drawn, grid)
    refused = set()
    while True:
        each = max(1.0, (_size(text) - fixed) / max(1, len(grid) - 1))  # bytes of a state
        larger = grid
        # as many steps as are predicted to fit, and one measurement after them
        while better := next((g for g in larger.larger() if g not in refused and _fits(g, fixed, each)), None):
            larger = better
        if larger is grid:
            return grid, text
        tried = _page_of(drawn, larger)
        if _size(tried) <= LIMIT:
            grid, text = larger, tried
        else:
            # what was drawn for it stays in memory: the next attempt shares most of it
            refused.add(larger)


def _size(text: str) -> int:
    """Return the bytes of a page: names and source that it shows are not all ASCII."""
    return len(text.encode())


def _fits(grid: Grid, fixed: int, each: float) -> bool:
    return len(grid) <= MOST and fixed + len(grid) * each <= LIMIT


def _page_of(drawn: Drawn, grid: Grid) -> str:
    states = list(grid)
    drawn.draw(states)
    return explorer_page(drawn, states, grid)


def explorer_page(drawn: Drawn, states: list[tuple], grid: Grid) -> str:
    """Return the HTML of these states, the start first."""
    film = drawn.frames.film(states)
    controls = []
    places = []  # for each control: value -> number of its stop
    for i, (field, control) in enumerate(drawn.controls.items()):
        stops = grid.stops(i)
        changed, there = control.on_page(stops)  # a slider counts the stops of the page
        state = _fields(control) | changed | {control.moved: there[stops.index(drawn.start[i])]}
        kind = type(control).__name__
        above = field in drawn.explorer.above
        controls.append({"kind": kind, "moved": control.moved, "above": above, "stops": there, "state": state})
        places.append({value: number for number, value in enumerate(stops)})
    # two bytes as long as they suffice: fewer zeros for deflate to tell
    wide = film.steps.max() >= 2**16
    first = drawn.fields[drawn.start]
    content = {
        "width": film.width,
        "height": film.height,
        "tile": TILE,
        "places": film.steps.shape[1],
        "bytes": 4 if wide else 2,
        "across": ACROSS,
        "controls": controls,
        "together": grid.together,
        "play": _play_button(drawn.explorer),
        "states": [[place[value] for place, value in zip(places, state, strict=True)] for state in states],
        "sentences": [drawn.texts[state][0] for state in states],
        "in_detail": IN_DETAIL,
        "codes": [drawn.texts[state][1] for state in states],
        "fields": [_changed(first, drawn.fields[state]) for state in states],
    }
    steps = film.steps.astype("<u4" if wide else "<u2").tobytes()
    title = type(drawn.explorer).__name__
    # instances: anywidget makes a class of its own for each, whose _esm is no text but a trait
    buttons = [*drawn.explorer._play, Button("Reset")]
    kinds = {type(control).__name__: control for control in (*drawn.controls.values(), *buttons)}
    compute = drawn.explorer.compute
    source = details_html("Show source", source_html(compute, *called_functions(compute)))
    details = details_html("In detail", "<div></div>")
    body = f"""<div class="row">
<div class="beside"></div>
<div class="figure"><div class="above"></div>
<div class="qlora-pane"><canvas role="img"></canvas><p class="said" aria-live="polite"></p>{details}<code></code></div>
</div>
</div>
{source}
<p class="note">{html.escape(_note(drawn, grid))}</p>"""
    parts = [_packed(_json(content)), _packed(steps), base64.b64encode(film.sheet).decode()]
    return whole_page(title, kinds, parts, "play", body)


def _played(explorer: "Explorer") -> int | None:
    """Return the number of the control that a Play button moves."""
    return list(explorer._controls).index(explorer.played) if explorer.played else None


def _play_button(explorer: "Explorer") -> dict | None:
    """Return the state of the Play button, and the number of the control that it moves."""
    if not explorer.played:
        return None
    (play,) = explorer._play
    # the page counts its presses from 0, whatever a live view has counted
    return {"control": _played(explorer), "state": _fields(play) | {"ticks": 0, "shown": 0}}


def _changed(first: list[dict], fields: list[dict]) -> list[dict]:
    """Return the fields of each control that differ from the first state's."""
    return [
        {name: value for name, value in now.items() if value != then[name]}
        for then, now in zip(first, fields, strict=True)
    ]


def _note(drawn: Drawn, grid: Grid) -> str:
    """Say what a notebook has and this page has not."""
    # a reader who misses a stop should not take it for impossible
    left_out = []
    for i, control in enumerate(drawn.controls.values()):
        shown, all_of_it = len(grid.stops(i)), sum(map(len, grid.rounds[i]))
        if shown < all_of_it:
            left_out.append(f"{control.description} has {shown} of {all_of_it} stops")
    if grid.together < len(drawn.controls):
        one = "one control" if grid.together == 1 else f"{grid.together} controls"
        left_out.append(f"{one} at a time can differ from the start")
    return f"Drawn beforehand, without a kernel: {'; '.join(left_out)}." if left_out else ""


def way_page(way: Control) -> str:
    """Return the HTML of a control alone, which brings all that it shows."""
    kind = type(way).__name__
    content = {"kind": kind, "moved": way.moved, "state": _fields(way) | {way.moved: getattr(way, way.moved)}}
    return whole_page(way.description, {kind: way}, [_packed(_json(content))], "playAlone", '<div class="alone"></div>')


def _json(content: dict) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _packed(content: bytes) -> str:
    """Compress, in an alphabet that no element's end and no escape is written in."""
    return base64.b64encode(zlib.compress(content, 9)).decode()


def whole_page(title: str, kinds: dict[str, Control], parts: list[str], player: str, body: str) -> str:
    """Return a page. kinds: a control of each kind, for its module. parts: in base64, for the player in playable.js."""
    modules = ",\n".join(f"{name}: (() => {{{_module(control)}}})()" for name, control in sorted(kinds.items()))
    script = f'"use strict";\nconst RENDER = {{{modules}}};\n{SCRIPT.read_text("utf-8")}\nbegin({player});\n'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # a page that can load nothing and run nothing but this script, whatever a name in it says
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    # the page's own rules come last, and win; the two kinds of button look alike
    styles = "".join(dict.fromkeys(kind._css for kind in (*kinds.values(), Pane, StatusLine)))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>{styles}{_CSS}</style>
</head>
<body>
<div class="qlora-explorer">
<noscript>This page needs JavaScript.</noscript>
<div class="qlora-status" role="status"></div>
{body}
</div>
<script type="text/plain" id="film">{" ".join(parts)}</script>
<script>{script}</script>
</body>
</html>
"""


def _module(control: Control) -> str:
    """Return the module of a control as the body of a function: a script of the page cannot import it."""
    return control._esm.replace("export default", "return", 1)


def check_page_path(path: str | Path) -> Path:
    """Return the path if a page may be written there: nothing is there, or a page that save_html wrote.

    Raises FileExistsError for anything else, FileNotFoundError for a folder that is not there, and ValueError for an
    empty path.
    """
    return out_replacing(path, "an explorer's page", _check_page)


def _check_page(path: Path) -> None:
    # the mark stands in the head: nobody's large file is read
    with path.open("rb") as file:
        if MARK.encode() not in file.read(1000):
            raise ValueError(f"{path} lacks the mark of an explorer's page")
