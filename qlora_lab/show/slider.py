"""Named controls for notebooks: `Slider`, `Toggle` and `Button`.

But: why not the sliders of ipywidgets? They have no accessible name, and while one of them has the focus, typing "a" or
"b" inserts cells in JupyterLab (measured). Here each control is a native HTML input: it has a name, the slider speaks
its unit, and Lab's shortcuts are off on the input itself (on a wrapper the attribute has no effect).

A slider is a list of allowed values and a position in it, and the browser moves only the position. So integers, floats,
powers of two and words are one case, and JavaScript never rounds a float.
"""

import math
from typing import NamedTuple

import traitlets as T

from qlora_lab.show.control import Control
from qlora_lab.show.grid import halved

FOCUS = "outline: 2px solid var(--jp-brand-color1, #1976d2); outline-offset: 2px;"
RING = "4px"  # what FOCUS takes around a control; where there is less room, a box of JupyterLab's cuts it off
MANY = 12  # words: up to this many, a page without a kernel keeps them all


class Steps(NamedTuple):
    """All values from `low` to `high` in steps of `step`, int or float."""

    low: float
    high: float
    step: float = 1


class Slider(Control):
    """A named slider over `choices`, a list of values or Steps.

    A start value between two steps becomes a step of its own: Slider("Offset", 0.9677083, Steps(0.9, 1.0, 0.01)) has
    the paper's exact value between 0.96 and 0.97.
    """

    moved = "position"
    unit = T.Unicode().tag(sync=True)
    labels = T.List(T.Unicode()).tag(sync=True)  # what the browser shows for each choice
    position = T.Int().tag(sync=True)
    value = T.Any()  # stays in Python
    value.allow_none = False  # an argument of Any would be ignored, and None would pass the check below

    _esm = """
    export default { render({ model, el }) {
      const label = document.createElement("label"), input = document.createElement("input");
      const shown = document.createElement("span"), labels = model.get("labels"), unit = model.get("unit");
      el.classList.add("qlora-slider", "qlora-control");
      input.type = "range"; input.min = 0; input.max = labels.length - 1; input.step = 1;
      input.id = "qlora-" + Math.random().toString(36).slice(2);
      input.dataset.lmSuppressShortcuts = "true";
      label.htmlFor = input.id; label.textContent = model.get("description");
      shown.ariaHidden = "true";                                     // spoken once, as the input's value text
      el.append(label, shown, input);
      const show = () => {
        input.value = model.get("position");
        shown.textContent = unit ? `${labels[input.value]} ${unit}` : labels[input.value];
        input.setAttribute("aria-valuetext", shown.textContent);
      };
      input.addEventListener("input", () => { model.set("position", +input.value); model.save_changes(); show(); });
      model.on("change:position", show); show();
    } };
    """
    _css = f"""
    .qlora-slider {{ display: grid; grid-template-columns: 1fr auto; column-gap: 12px; margin: 2px 0 10px;
                     padding: 0 {RING};
                     font-size: var(--jp-ui-font-size1, 13px); color: var(--jp-ui-font-color1, inherit); }}
    .qlora-slider label {{ font-weight: 600; }}
    .qlora-slider span {{ font-variant-numeric: tabular-nums; }}
    .qlora-slider input {{ grid-column: 1 / -1; width: 100%; margin: 4px 0 0; }}
    .qlora-slider input:focus-visible {{ {FOCUS} }}
    """

    def __init__(self, description, value, choices, unit=""):
        if isinstance(choices, Steps):
            self.choices = _grid(description, value, choices)
            self._rule = f"from {choices.low} to {choices.high} in steps of {choices.step}"
        else:
            self.choices = tuple(choices)
            self._rule = f"one of {', '.join(map(repr, self.choices))}"
        start = self._find(description, value)  # ValueError if it is not a choice
        labels = [f"{c:.7g}" if isinstance(c, float) else str(c) for c in self.choices]  # float32 has 7 digits
        super().__init__(description=description, unit=unit, labels=labels, position=start, value=self.choices[start])

    def allowed(self, value, name=None):
        """Return the choice equal to `value`. ValueError names the rule and the fix if there is none."""
        return self.choices[self._find(name or self.description, value)]

    def _find(self, name, value):
        for i, choice in enumerate(self.choices):
            if _same(value, choice):
                return i
        raise ValueError(f"{name}={value!r} is not allowed: {self._rule}. {_nearest(value, self.choices)}")

    def takes(self, value):
        return type(value) is int and 0 <= value < len(self.choices)  # True is not 1

    def rule(self):
        return f"a whole number from 0 to {len(self.choices) - 1}"

    def rounds(self):
        # nothing lies between two words; but a model has hundreds of tensors
        if len(self.choices) <= MANY and all(isinstance(choice, str) for choice in self.choices):
            return [list(range(len(self.choices)))]
        return halved(len(self.choices), self.position)

    def on_page(self, stops):
        return {"labels": [self.labels[stop] for stop in stops]}, list(range(len(stops)))

    @T.validate("value")
    def _check_value(self, proposal):
        return self.allowed(proposal["value"])

    @T.observe("position")
    def _position_moved(self, change):  # in the browser
        self.value = self.choices[change["new"]]

    @T.observe("value")
    def _value_moved(self, change):  # in Python
        self.position = self._find(self.description, change["new"])

    def __repr__(self):
        unit = f", unit={self.unit!r}" if self.unit else ""
        return f"Slider({self.description!r}, {self.value!r}{unit})"


class Toggle(Control):
    """A named checkbox; `.value` is True or False."""

    value = T.Bool().tag(sync=True)

    _esm = """
    export default { render({ model, el }) {
      const label = document.createElement("label"), input = document.createElement("input");
      el.classList.add("qlora-toggle", "qlora-control");
      input.type = "checkbox"; input.dataset.lmSuppressShortcuts = "true";
      label.append(input, model.get("description")); el.append(label);
      const show = () => { input.checked = model.get("value"); };
      input.addEventListener("change", () => { model.set("value", input.checked); model.save_changes(); });
      model.on("change:value", show); show();
    } };
    """
    _css = f"""
    .qlora-toggle {{ margin: 2px 0 10px; padding: 0 {RING}; font-size: var(--jp-ui-font-size1, 13px);
                     color: var(--jp-ui-font-color1, inherit); }}
    .qlora-toggle label {{ display: flex; align-items: center; gap: 6px; font-weight: 600; }}
    .qlora-toggle input {{ margin: 0; }}
    .qlora-toggle input:focus-visible {{ {FOCUS} }}
    """

    def __init__(self, description, value=False):
        super().__init__(description=description, value=self.allowed(value, description))

    def allowed(self, value, name=None):
        """Return `value` if it is a bool. ValueError names the rule and the fix if it is not."""
        if not isinstance(value, bool):
            raise ValueError(f"{name or self.description}={value!r} is not allowed: it is a switch. Use True or False.")
        return value

    def takes(self, value):
        return isinstance(value, bool)

    def rule(self):
        return "true or false"

    def rounds(self):
        return [[False, True]]

    def __repr__(self):
        return f"Toggle({self.description!r}, {self.value!r})"


class Button(Control):
    """A button; `.clicks` counts the presses, so `observe(..., "clicks")` is its event."""

    moved = "clicks"
    clicks = T.Int(0).tag(sync=True)  # the browser counts

    _esm = """
    export default { render({ model, el }) {
      const button = document.createElement("button");
      el.classList.add("qlora-button", "qlora-control");
      button.type = "button"; button.dataset.lmSuppressShortcuts = "true";
      button.textContent = model.get("description");
      button.addEventListener("click", () => { model.set("clicks", model.get("clicks") + 1); model.save_changes(); });
      el.append(button);
    } };
    """
    _css = f"""
    .qlora-button {{ padding: {RING}; }}
    .qlora-button button {{ padding: 4px 12px; font: inherit; color: var(--jp-ui-font-color1, inherit); cursor: pointer;
                            background: var(--jp-layout-color2, #eee); border: 1px solid var(--jp-border-color1, #999);
                            border-radius: 3px; }}
    .qlora-button button:focus-visible {{ {FOCUS} }}
    """

    def __init__(self, description):
        super().__init__(description=description)

    def takes(self, value):
        return type(value) is int and self.clicks <= value < 2**53  # beyond it JavaScript cannot add 1

    def rule(self):
        return f"a whole number of at least {self.clicks}"

    def __repr__(self):
        return f"Button({self.description!r})"


def _grid(name, value, steps):
    """List the values of `steps`, with the start value among them."""
    low, high, step = steps
    if not (low < high and step > 0):
        raise ValueError(f"Slider {name!r}: low={low}, high={high}, step={step}: need low < high and step > 0.")
    count = math.floor((high - low) / step + 1e-9) + 1  # (0.3 - 0) / 0.1 is below 3
    digits = 0 if isinstance(step, int) else max(0, 9 - math.floor(math.log10(step)))  # nine more than the step needs
    grid = [low + i * step if isinstance(step, int) else round(low + i * step, digits) for i in range(count)]
    extra = isinstance(value, float) and low < value < high and not any(_same(value, g) for g in grid)
    return tuple(sorted([*grid, value]) if extra else grid)


def _same(value, choice):
    """Compare, forgiving the last bits of a float; True is not 1, and "4" is not 4."""
    if isinstance(choice, (bool, str)) or isinstance(value, (bool, str)):
        return type(value) is type(choice) and value == choice
    try:
        return math.isclose(value, choice, rel_tol=1e-9, abs_tol=1e-12)
    except TypeError:  # neither is a number
        return value == choice


def _nearest(value, choices):
    try:
        return f"Nearest: {min(choices, key=lambda c: abs(c - value))!r}."
    except TypeError:  # no distance between words
        return f"Try {choices[0]!r}."
