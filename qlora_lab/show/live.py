"""The live plot of a run: watch it, and stop it, in the notebook that trains.

In: a Training. Out: its Run. During the training a notebook shows a picture of the losses, a line of text and a button;
at the end, the picture and one sentence of numbers, which a stored notebook keeps and nbval compares.

    run = await live(Training(model, tokenizer, "docstrings", "runs/first", Settings(steps=60)))

With `await` the kernel (ipykernel 7.4 or newer) serves widgets between two steps: the button, and the sliders of other
cells. Without `await` a cell serves none before its end, and an older kernel never does. An interrupt always works.

The thin grey curve is the mean length of a step's examples. With group_by_length it is a saw, and so is the loss.
"""

import asyncio
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import ipywidgets as W
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from tqdm.auto import tqdm

from qlora_lab.show.escape import for_html
from qlora_lab.show.figure import ACROSS, COLOURS, Blit, WithSentence, new_figure
from qlora_lab.show.pane import Pane
from qlora_lab.show.slider import Button
from qlora_lab.show.still import StatusLine, show_over
from qlora_lab.train.trainer import STOPPED, Run, Training

WINDOW = 10  # steps in the smoothed line, in the speed, and in the two means of the sentence
REDRAW_EVERY = 0.5  # seconds
TURNS = 10  # of the kernel's loop after a step. A press needs five: with one turn its answer came four steps later
PAUSE = 0.01  # share of a step's time for the turns, so that messages in a socket arrive


async def live(training: Training) -> Run:
    """Make the remaining steps of `training`, with a live plot if a notebook shows one.

    The button ends the run after the current step; the Run then has ended == "asked to stop", and a Training with
    resume=True continues it. Raises whatever `finetune` raises: an interrupt of the kernel, like training.stop(), is a
    KeyboardInterrupt once all is saved. Without a notebook it trains with the progress bar alone.
    """
    kernel, display = _notebook()
    plot = LivePlot(training) if kernel else None
    if plot:
        training.progress = False  # the panel shows the progress
        display(plot)
    try:
        with _reporting_widgets(kernel) if kernel else nullcontext():
            await _train(training, plot)
    finally:
        if plot:
            plot.close()
        if plot and plot.lines:  # after an error, too: the steps before it
            plot.redraw()
            display(WithSentence(plot.png, plot.summary()))
    if training.result.ended == STOPPED and not (plot and plot.button.clicks):
        raise KeyboardInterrupt(training.stopped)
    return training.result


async def _train(training: Training, plot: "LivePlot | None") -> None:
    with closing(iter(training)) as steps:
        for line in steps:
            if plot:
                plot.follow()
            try:
                for _ in range(TURNS):
                    await asyncio.sleep(PAUSE / TURNS * line["seconds"])
            except asyncio.CancelledError:  # the caller has given up: save what was learned
                training.stop()
                next(steps, None)
                raise


class LivePlot:
    """The picture of a run so far (`png`), its sentence (`summary()`), and a `widget` that shows both with a button."""

    def __init__(self, training: Training):
        self.training = training
        self.lines: list[dict] = []  # of the steps made until now
        self.png = b""
        self._blit = Blit(*self._draw())
        self._pane = Pane()
        self._text = W.HTML()  # the progress
        self._due = 0.0  # the time of the next picture
        self.button = Button("Stop after this step")
        self.button.observe(lambda _: training.stop(), "clicks")
        row = W.Box([self.button, self._text], layout=W.Layout(flex_flow="row wrap", grid_gap="2px 16px"))
        self.widget = W.VBox([StatusLine(self.button), row, self._pane])
        self.widget.add_class("qlora-live")

    def follow(self) -> None:
        """Show the steps made until now, at most twice per second and in at most a tenth of the time."""
        self.lines = self.training.lines
        start = time.perf_counter()
        if start < self._due:
            return
        self.redraw()
        self._pane.show(self.png, self.summary())
        self._text.value = f"<div>{for_html(self.progress())}</div>"
        end = time.perf_counter()
        self._due = end + max(REDRAW_EVERY, 9 * (end - start))  # 9 parts of training for 1 of drawing

    def close(self) -> None:
        """Take the panel off the page."""
        for widget in (self.widget, *self.widget.children, self.button, self._text):
            widget.close()

    def redraw(self) -> None:
        """Draw `png` from the lines. The limits widen in strides, so that a full draw is rare."""
        steps = [line["step"] for line in self.lines]
        losses = [line["loss"] for line in self.lines]
        held_out = self.held_out()
        self.points.set_data(steps, losses)  # these artists move; the axes stay as pixels
        self.mean.set_data(steps, running_mean(losses))
        self.held.set_data([step for step, _ in held_out], [loss for _, loss in held_out])
        self.lengths.set_data(steps, [line["mean_length"] for line in self.lines])
        drawn = losses + [loss for _, loss in held_out]
        locator = MaxNLocator(5)
        ticks = locator.tick_values(*locator.nonsingular(min(drawn), max(drawn)))  # one point has no range
        shown = min(self.training.settings.steps, max(32, 2 ** math.ceil(math.log2(len(steps)))))  # 32, 64, 128, ...
        self.left.set(xlim=(0, shown + 1), ylim=(ticks[0], ticks[-1]))
        self.png = self._blit.frame()

    def _draw(self) -> tuple[Figure, list[Line2D]]:
        settings = self.training.settings
        fig, self.left = new_figure(width=ACROSS, height=3)
        right = self.left.twinx()  # for lengths, in tokens
        self.left.set(xlabel="step", ylabel="loss, nats per answer token")
        right.set(ylim=(0, settings.max_length), ylabel="mean length, tokens")
        right.spines["top"].set_visible(False)
        styles = {  # in drawing order
            "lengths": (right, "-", "#999999", 0.8, "mean length"),
            "points": (self.left, ".", COLOURS["sky"], 1, "each step"),
            "mean": (self.left, "-", COLOURS["blue"], 2, f"mean of {WINDOW} steps"),
            "held": (self.left, "D", COLOURS["orange"], 1, "held out"),
        }
        for name, (ax, form, colour, width, label) in styles.items():
            setattr(self, name, ax.plot([], [], form, color=colour, lw=width, label=label)[0])
        moving = [getattr(self, name) for name in styles]
        shown = moving if settings.eval_every else moving[:-1]  # without evaluations no "held out"
        fig.legend(handles=shown, loc="outside upper left", ncols=len(shown), frameon=False)
        return fig, moving

    def held_out(self) -> list[tuple[int, float]]:
        """List (step, loss) of each evaluation."""
        return [(line["step"], line["held_out_loss"]) for line in self.lines if "held_out_loss" in line]

    def progress(self) -> str:
        """Say where the run is, with its speed: for the moment, not for a stored notebook."""
        last = self.lines[-WINDOW:]  # the first steps are slower
        seconds = sum(line["seconds"] for line in last)
        tokens = sum(line["tokens"] for line in last)
        left = (self.training.settings.steps - len(self.lines)) * seconds / len(last)
        return (
            f"step {len(self.lines)} of {self.training.settings.steps}, loss {last[-1]['loss']:.3f}, "
            f"{tokens / seconds:.0f} tokens per second, {tqdm.format_interval(left)} left"
        )

    def summary(self) -> str:
        """Say in one sentence the numbers that an equal run gives again: alt text, and the text that nbval compares."""
        losses = [line["loss"] for line in self.lines]
        held_out = self.held_out()
        run = self.training.result  # None while it trains
        few = min(WINDOW, len(losses))
        text = (
            f"Training loss over {len(losses)} of {self.training.settings.steps} steps: "
            f"mean of the first {few} {np.mean(losses[:few]):.2f}, of the last {few} {np.mean(losses[-few:]):.2f}"
        )
        if held_out:
            step, loss = min(held_out, key=lambda evaluation: evaluation[1])
            text += f"; lowest held-out loss {loss:.2f} at step {step}"
        if run:
            text += f". Ended: {run.ended}" + ("; resume=True goes on" if run.ended == STOPPED else "")
        return text

    def __repr__(self) -> str:
        return f"training: {self.training.settings.steps} steps of {self.training.settings.batch_size} examples"

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, object]:
        """Give the sentence that a stored notebook keeps. The final picture is an output of its own, because nbval
        cannot compare an output that changes after it was shown."""
        return {"text/html": for_html(repr(self)), "text/plain": repr(self)}

    def _ipython_display_(self) -> None:
        """Show the live panel, over the sentence that stays."""
        show_over(self._repr_mimebundle_(), self.widget)


def running_mean(values: list[float]) -> np.ndarray:
    """Average the last WINDOW values at each position, fewer at the start.

    >>> running_mean([1.0, 2.0, 6.0]).tolist()
    [1.0, 1.5, 3.0]
    """
    total = np.concatenate([[0.0], np.cumsum(values)])  # (n + 1,)
    end = np.arange(1, len(total))  # of each window, exclusive
    start = np.maximum(end - WINDOW, 0)  # (n,)
    return (total[end] - total[start]) / (end - start)


def _notebook() -> tuple[Any, Callable[[object], None]]:
    """Return the kernel of this process (None in a plain process, where nobody can press a button) and `display`."""
    ipython = sys.modules["IPython"]  # ipywidgets has imported it
    return getattr(ipython.get_ipython(), "kernel", None), ipython.display.display


@contextmanager
def _reporting_widgets(kernel: Any) -> Iterator[None]:
    """Report the end of each message of a widget, for a widget waits for it before it sends the next.

    ipykernel 7.4 serves messages while a cell awaits, but does not report the end of those that it serves in the cell's
    own thread. A slider that moved once during the training would be dead from then on, even after the cell.
    """
    handle = kernel.shell_handlers["comm_msg"]
    cell = kernel.get_parent("shell")
    thread = threading.current_thread()

    def handle_and_report(stream: Any, ident: Any, message: dict) -> None:
        handle(stream, ident, message)
        if threading.current_thread() is thread:
            for state, parent in (("idle", message), ("busy", cell)):  # the cell itself still runs
                kernel.session.send(kernel.iopub_socket, "status", {"execution_state": state}, parent=parent)

    kernel.shell_handlers["comm_msg"] = handle_and_report
    try:
        yield
    finally:
        kernel.shell_handlers["comm_msg"] = handle
