"""An explorer: a few named controls, one picture, one sentence of numbers. It holds no maths.

A subclass writes five short methods, none about widgets or browsers: `controls`, `compute`, `draw`, `update` and
`describe`. `Explorer(**state)` is reproducible: the same state gives the same bytes, and `.code()` is the line to copy.

Not here: how a figure becomes pixels (figure.py), how a control works in the browser (slider.py).
"""

import html
import threading
from abc import ABC, abstractmethod

import ipywidgets as W
from matplotlib.figure import Figure

from qlora_lab.show.figure import DRAWING, Blit, WithSentence, caption, compressed
from qlora_lab.show.pane import Pane
from qlora_lab.show.play import Play
from qlora_lab.show.playable import SavedPage, save_page
from qlora_lab.show.slider import Button
from qlora_lab.show.source import called_functions, details_html, source_html
from qlora_lab.show.still import StatusLine, show_over


class Explorer(ABC):
    """Controls, a picture and a sentence that follow one state, with or without a browser.

    explorer.set(bits=3); explorer.reset(); explorer.state; explorer.result; explorer.summary(); explorer.png
    above: fields whose controls stand over the picture, as wide as it, instead of beside it.
    played: the field whose slider has a button that plays it.
    """

    above: tuple[str, ...] = ()
    played: str = ""

    @abstractmethod
    def controls(self):
        """Return {field: Slider or Toggle}, with start values."""

    @staticmethod
    @abstractmethod
    def compute(state):
        """State -> result. Pure, so tests need no browser, and "Show source" shows all that matters."""

    @abstractmethod
    def draw(self):
        """Return the figure and the artists that move, in drawing order. Called once."""

    @abstractmethod
    def update(self, result):
        """Give the moving artists their data. Called on each change, so create nothing here."""

    @staticmethod
    @abstractmethod
    def describe(state, result):
        """Say the key numbers in one sentence."""

    def __init__(self, **state):
        self._controls = self.controls()
        self._blit = Blit(*self.draw())  # the only full draw
        self._pane = Pane()  # picture, sentence and line of code
        self._paused = False  # True: controls change without a redraw
        self._lock = threading.RLock()  # JupyterLab sends the messages of some controls to a second thread
        self.set(**state)
        self._start = self.state  # for the reset
        for control in self._controls.values():
            control.observe(self._redraw, "value")
        self.widget = self._layout()

    @property
    def state(self):
        """The controls' values now: {field: value}."""
        return {field: control.value for field, control in self._controls.items()}

    def set(self, **state):
        """Change some controls and redraw once. ValueError names the field, the rule and the fix."""
        unknown = [field for field in state if field not in self._controls]
        if unknown:
            raise ValueError(f"{type(self).__name__} has no field {unknown[0]!r}: use {', '.join(self._controls)}.")
        checked = {field: self._controls[field].allowed(value, field) for field, value in state.items()}
        with self._lock:
            self._paused = True  # all values are allowed: set them together and draw once
            for field, value in checked.items():
                self._controls[field].value = value
            self._paused = False
            self._redraw()

    def reset(self):
        """Set all controls to where the explorer was opened."""
        self.set(**self._start)

    def summary(self):
        """Return one sentence with the key numbers: alt text, caption, and the text that nbval compares."""
        return self.describe(self.state, self.result)

    def code(self):
        """Return the line of Python that makes this explorer again, in its present state."""
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.state.items())})"

    def save_html(self, path, progress=True) -> SavedPage:
        """Write a page that plays in a browser without a kernel or a network, and begins with the present state.

        Its states are drawn now, for up to half a minute. It has at most half a megabyte, so it leaves stops out where
        they are many; SavedPage says how many. A page that an earlier call wrote is replaced. Raises FileExistsError
        for any other file, OSError for a place that cannot be written, and ValueError for an empty path.
        """
        return save_page(self, path, progress)

    def _redraw(self, _change=None):
        with self._lock:
            if not self._paused:
                self._draw_state(self.state)

    def _draw_state(self, state):
        self.result = self.compute(state)
        self.update(self.result)
        self.png = self._blit.frame()
        sentence = self.describe(state, self.result)
        self._pane.show(self.png, sentence, f"{caption(sentence)}<code>{html.escape(self.code())}</code>")

    def _layout(self):
        """Put controls beside the picture, or above it if the window is narrow: a flex box that wraps."""
        reset = Button("Reset")
        reset.observe(lambda _: self.reset(), "clicks")
        over = [self._controls[field] for field in self.above]
        beside = [control for control in self._controls.values() if control not in over]
        self._play = [Play(self._controls[self.played])] if self.played else []  # it follows its slider
        panel = W.VBox([*beside, *self._play, reset], layout=W.Layout(flex="1 1 240px", min_width="0"))
        # what stands over the picture scrolls with it, and is never narrower: a handle stands over its line
        least = f"{self._pane.least + 4}px" if over else "0"  # 2 on each side are the picture's margin
        figure = W.VBox([*over, self._pane], layout=W.Layout(min_width=least, width="100%"))
        figure = W.Box([figure], layout=W.Layout(flex="3 1 420px", min_width="0", overflow="auto" if over else None))
        if over:
            figure.add_class("qlora-picture")  # a place that scrolls, as the pane's own
        row = W.Box([panel, figure], layout=W.Layout(flex_flow="row wrap", grid_gap="8px 24px"))
        source = details_html("Show source", source_html(self.compute, *called_functions(self.compute)))
        whole = W.VBox([StatusLine(*self._controls.values(), *self._play, reset), row, W.HTML(source)])
        whole.add_class("qlora-explorer")  # for the browser tests
        return whole

    def __repr__(self):
        return self.summary()

    def _repr_mimebundle_(self, include=None, exclude=None):
        """Give a static page the picture, and nbval the sentence."""
        bundle = WithSentence(compressed(self.png), self.summary())._repr_mimebundle_()
        bundle["text/html"] += "<div>Run this cell to play.</div>"
        return bundle

    def _ipython_display_(self):
        """Show the live view in a notebook, over the picture that stays when it is closed."""
        show_over(self._repr_mimebundle_(), self.widget)


def fix_layout(fig: Figure) -> None:
    """Fix the layout of `fig` as it is now. Otherwise the first state's texts would decide the layout of all later
    states, and equal states would not give equal bytes."""
    with DRAWING:
        fig.draw_without_rendering()
    fig.set_layout_engine("none")
