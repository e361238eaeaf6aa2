"""A guess before a measurement: a box that records it, and a sentence that compares it with what was measured.

In: a question, with a list of choices or for a number with its unit. Out: a Guess; `.answer` is None until one is
recorded, in the browser or by `.record(12)`. The measured value always comes from the cell that measures:

    used = guess("How many codes does the block use?", unit="codes")  # shows a box
    used.compare(block["used"])  # You guessed 12 codes; the answer is 8 codes.

Not here: exercises (check.py). A guess may be wrong, and gets no hint.
"""

import math
import reprlib
import sys

import ipywidgets as W
import traitlets as T

from qlora_lab.show.control import Shown
from qlora_lab.show.escape import for_html
from qlora_lab.show.slider import FOCUS
from qlora_lab.show.still import StatusLine, show_over


def guess(question, choices=(), unit=""):
    """Ask `question` before a cell measures the answer: for one of `choices` (texts) or, without choices,
    for a number in `unit`.

    In a notebook a box appears. Returns the Guess, whose `compare(measured)` sets the guess beside the measured value.

    >>> gradient = guess("Which matrix has a gradient?", ["A", "B"])
    >>> gradient.record("A")
    >>> gradient.compare("B")
    You guessed "A"; the answer is "B".
    """
    asked = Guess(question, choices, unit)
    if getattr(sys.modules["IPython"].get_ipython(), "kernel", None):  # ipywidgets has imported IPython
        show_over(asked.still(), asked.widget)
    return asked


class Guess:
    """A question with a box; `answer` is what was recorded. `repr` is the text that a stored notebook keeps."""

    def __init__(self, question, choices=(), unit=""):
        self.question, self.choices, self.unit = question, list(choices), unit
        self.answer = None
        self.box = _Box(question=question, choices=self.choices, unit=unit)
        self.box.on_msg(lambda _, message, __: self._from_browser(message))
        self.widget = W.VBox([StatusLine(), self.box])
        self.widget.add_class("qlora-live")  # so that still.py hides the still under it

    def record(self, answer):
        """Keep `answer` as the guess. ValueError if it is not among the choices or is not a finite
        number."""
        self.answer = self._allowed(answer)
        self.box.said = f"Recorded: {self._shown(self.answer)}. Now run the next cells."

    def compare(self, measured):
        """Say in a sentence what was guessed and what was measured."""
        measured = self._allowed(getattr(measured, "item", lambda: measured)())  # a tensor's number
        if self.answer is None:
            return Sentence(f"The answer is {self._shown(measured)}. (You recorded no guess.)")
        guessed = f"You guessed {self._shown(self.answer)}"
        if self._shown(self.answer) == self._shown(measured):
            return Sentence(f"{guessed}, and that is right.")
        return Sentence(f"{guessed}; the answer is {self._shown(measured)}.")

    def still(self):
        """Return what stays on the page when the kernel is gone."""
        return {
            "text/plain": repr(self),
            "text/html": f"<div>{for_html(self.question)}</div><div>Run this cell to guess.</div>",
        }

    def _from_browser(self, message):  # not trusted: it may hold anything
        try:
            self.record(message.get("guess") if isinstance(message, dict) else message)
        except ValueError as err:
            self.box.said = f"Nothing was recorded: {err}"

    def _allowed(self, answer):
        if self.choices:
            if isinstance(answer, str) and answer in self.choices:
                return answer
            allowed = ", ".join(self.choices)
            raise ValueError(f"{_given(answer)} is not among the choices. Choose one of: {allowed}.")
        try:
            number = math.nan if isinstance(answer, bool) else float(answer)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{_given(answer)} is not a number. Type one, such as 12 or 0.5.")
        return int(number) if number.is_integer() else number

    def _shown(self, value):
        if self.choices:
            return f'"{value}"'
        first, space, rest = self.unit.partition(" ")  # "bits per weight" -> "1 bit per weight"
        unit = first.removesuffix("s") + space + rest if value == 1 else self.unit
        return f"{_number(value)} {unit}".strip()

    def __repr__(self):
        if self.answer is None:
            return f"{self.question} Run this cell to guess."
        return f"{self.question} You guessed {self._shown(self.answer)}."


class Sentence(str):
    """A text that a notebook shows without quotation marks."""

    __repr__ = str.__str__


class _Box(Shown):
    """The question, its input and a button. Python reads none of its state, only the messages of the button."""

    question = T.Unicode().tag(sync=True)
    choices = T.List(T.Unicode()).tag(sync=True)
    unit = T.Unicode().tag(sync=True)
    said = T.Unicode().tag(sync=True)

    _esm = """
    const make = (tag, more) => Object.assign(document.createElement(tag), more);
    export default { render({ model, el }) {
      const choices = model.get("choices"), name = "qlora-" + Math.random().toString(36).slice(2);
      const box = make("fieldset"), button = make("button", { type: "button", textContent: "Record" });
      const said = make("div", { role: "status" }), inputs = choices.length
        ? choices.map((value) => make("input", { type: "radio", name, value }))
        : [make("input", { type: "number", step: "any", ariaLabel: model.get("question") })];
      el.classList.add("qlora-guess", "qlora-control");
      box.append(make("legend", { textContent: model.get("question") }));
      for (const input of inputs) {
        const label = make("label");
        label.append(input, choices.length ? input.value : model.get("unit")); box.append(label);
      }
      box.append(button, said); el.append(box);
      for (const control of [...inputs, button]) control.dataset.lmSuppressShortcuts = "true";
      const record = () => {
        model.send({ guess: (choices.length ? inputs.find((input) => input.checked) : inputs[0])?.value ?? "" });
      };
      button.addEventListener("click", record);
      box.addEventListener("keydown", (event) => { if (event.key === "Enter" && event.target !== button) record(); });
      const show = () => { said.textContent = model.get("said"); };
      model.on("change:said", show); show();
    } };
    """
    _css = f"""
    .qlora-guess fieldset {{ display: flex; flex-wrap: wrap; align-items: center; gap: 6px 16px; margin: 2px 0 6px;
                             padding: 6px 12px 10px; border: 1px solid var(--jp-border-color1, #999);
                             font-size: var(--jp-ui-font-size1, 13px); color: var(--jp-ui-font-color1, inherit); }}
    .qlora-guess legend {{ padding: 0 4px; font-weight: 600; }}
    .qlora-guess label {{ display: flex; align-items: center; gap: 6px; }}
    .qlora-guess input[type=number] {{ width: 9em; }}
    .qlora-guess :is(input[type=number], button) {{ padding: 4px 8px; font: inherit; border-radius: 3px;
      color: var(--jp-ui-font-color1, inherit); background: var(--jp-layout-color2, #eee);
      border: 1px solid var(--jp-border-color1, #999); }}
    .qlora-guess :is(input, button):focus-visible {{ {FOCUS} }}
    .qlora-guess [role=status] {{ flex-basis: 100%; }}
    .qlora-guess [role=status]:empty {{ display: none; }}
    """


def _given(answer):
    return "An empty box" if answer == "" else reprlib.repr(answer)  # a hostile answer can be long


def _number(value):
    """Write a number for readers: whole ones and large ones with commas, others with four digits."""
    if abs(value) >= 1e15:
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 999.95 else f"{value:.4g}"  # 999.95 in four digits is 1000
