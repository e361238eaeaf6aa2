"""A codebook in the reader's hands: `Levels`, 16 handles on an axis, to drag or to move by keys.

Handles are nested SVG elements placed in percent, so they keep their size when the control is narrow. A press takes the
nearest handle, wherever it lands: two handles a step apart overlap, and a finger covers three.
A moved level lies on a grid of hundredths, at least a step from its neighbours; the others keep their values.
Messages are few: ipywidgets keeps one on its way, and only the last of those that wait.
"""

import reprlib

import torch
import traitlets as T

from qlora_lab.quant.codebook import check_levels
from qlora_lab.show.control import Control
from qlora_lab.show.slider import FOCUS

N_LEVELS = 16  # of a codebook of 4 bits
PER_UNIT = 100  # steps from 0 to 1


def shortest(levels: torch.Tensor) -> tuple[float, ...]:
    """Turn float32 levels into the shortest floats that round to them again, for a line that a reader can copy."""
    return tuple(float(str(level)) for level in levels.numpy())  # numpy prints a float32 so


class Levels(Control):
    """16 levels to drag. starts: named levels to begin with, a button for each.

    Left and right move the focused level by 0.01, with Shift by 0.1; Home and End take it to its neighbours. A level
    that is dragged close to zero becomes exactly zero; keys reach 0.01 and -0.01, too.
    span: the places of -1 and 1, as shares of the control's width, to match the axis of a picture below.
    """

    value = T.Tuple().tag(sync=True)  # 16 floats
    starts = T.Dict().tag(sync=True)  # name -> 16 floats
    span = T.Tuple((0.02, 0.98)).tag(sync=True)
    per_unit = T.Int(PER_UNIT, read_only=True).tag(sync=True)

    _esm = """
    const NEAR = 24, SNAP = 2;                                       // pixels to the handle; steps to zero
    const PIN = "M0 36 L-4 26 V8 A4 4 0 0 1 4 8 V26 Z";              // it points down, at the picture
    export default { render({ model, el }) {
      const n = model.get("per_unit"), levels = () => model.get("value");
      let named = null;                                              // the level that the read-out names
      const make = (kind, parent, attributes = {}) => {
        const made = kind === "svg" || kind === "path" || kind === "line"
          ? document.createElementNS("http://www.w3.org/2000/svg", kind) : document.createElement(kind);
        for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
        parent.append(made);
        return made;
      };
      const limits = (i) => {                                        // in steps; the last bits of 0.29 * 100 forgiven
        const all = levels();
        return [i ? Math.ceil(all[i - 1] * n + 1 - 1e-6) : -n,
                i < all.length - 1 ? Math.floor(all[i + 1] * n - 1 + 1e-6) : n];
      };
      const move = (i, steps) => {
        const [low, high] = limits(i), all = [...levels()];
        if (low > high) return;                                      // given closer together than two steps
        all[i] = Math.min(Math.max(Math.round(steps), low), high) / n;
        model.set("value", all); model.save_changes(); show();
      };

      el.classList.add("qlora-levels", "qlora-control");
      const head = make("div", el), shown = make("output", el, { "aria-hidden": "true" }), buttons = make("div", el);
      head.textContent = model.get("description");
      const axis = make("svg", el, { height: 38, role: "group", "aria-label": model.get("description") });
      const line = make("line", axis, { y1: 37, y2: 37 });
      const pins = levels().map((_, i) => {
        const pin = make("svg", axis, { role: "slider", tabindex: 0, overflow: "visible", "aria-label": `Level ${i}`,
                                        "data-lm-suppress-shortcuts": "true" });
        make("path", pin, { d: PIN });
        pin.addEventListener("focus", () => { named = i; show(); });
        pin.addEventListener("keydown", (e) => {
          const now = levels()[i] * n, way = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[e.key];
          const [low, high] = limits(i), end = { Home: low, End: high }[e.key];
          if (way === undefined && end === undefined) return;
          e.preventDefault();
          move(i, end ?? now + way * (e.shiftKey ? n / 10 : 1));
        });
        return pin;
      });

      const show = () => {
        const all = levels();                                        // another script can set anything
        if (!Array.isArray(all) || all.length !== pins.length || !all.every(Number.isFinite)) return;
        const [a, b] = model.get("span"), place = (level) => `${100 * (a + (b - a) * (level + 1) / 2)}%`;
        line.setAttribute("x1", place(-1)); line.setAttribute("x2", place(1));
        all.forEach((level, i) => {
          const [low, high] = limits(i), pin = pins[i];
          pin.setAttribute("x", place(level));
          pin.setAttribute("aria-valuenow", level);
          pin.setAttribute("aria-valuemin", Math.min(low / n, level));
          pin.setAttribute("aria-valuemax", Math.max(high / n, level));
          pin.setAttribute("aria-valuetext", `${+level.toFixed(3)} of absmax`);
          if (i === named) shown.textContent = `Level ${i}: ${+level.toFixed(3)} of absmax`;
        });
      };

      let held = null;
      const at = (e) => {
        const box = axis.getBoundingClientRect(), [a, b] = model.get("span");
        return { level: 2 * ((e.clientX - box.left) / box.width - a) / (b - a) - 1, pixel: 2 / (b - a) / box.width };
      };
      axis.addEventListener("pointerdown", (e) => {
        if (e.button || held) return;
        const { level, pixel } = at(e), away = levels().map((one) => Math.abs(one - level));
        const i = away.indexOf(Math.min(...away));
        if (away[i] > NEAR * pixel) return;
        e.preventDefault(); pins[i].focus(); axis.setPointerCapture(e.pointerId);
        held = { i, id: e.pointerId, grip: levels()[i] - level };    // it does not jump to where it was taken
      });
      axis.addEventListener("pointermove", (e) => {
        if (held?.id !== e.pointerId) return;
        const steps = (at(e).level + held.grip) * n;
        move(held.i, Math.abs(steps) <= SNAP ? 0 : steps);
      });
      for (const end of ["pointerup", "pointercancel"]) axis.addEventListener(end, () => { held = null; });

      const offer = () => {
        buttons.replaceChildren("Start from ");
        for (const name of Object.keys(model.get("starts"))) {
          const button = make("button", buttons, { type: "button", "aria-label": `Start from ${name}`,
                                                   "data-lm-suppress-shortcuts": "true" });
          button.textContent = name;
          button.addEventListener("click", () => {
            model.set("value", model.get("starts")[name]); model.save_changes(); show();
          });
        }
      };
      model.on("change:value change:span", show);
      offer(); show();
    } };
    """
    _css = f"""
    .qlora-levels {{ display: grid; grid-template-columns: 1fr auto; column-gap: 12px; min-width: 0;
                     margin: 2px var(--jp-widgets-margin, 2px) 0;  /* as the picture's */
                     font-size: var(--jp-ui-font-size1, 13px); color: var(--jp-ui-font-color1, inherit); }}
    .qlora-levels > div:first-child {{ font-weight: 600; }}
    .qlora-levels output {{ font-variant-numeric: tabular-nums; }}
    .qlora-levels > div:not(:first-child), .qlora-levels > svg {{ grid-column: 1 / -1; }}
    .qlora-levels button {{ margin: 2px 2px; padding: 1px 8px; font: inherit; color: inherit; cursor: pointer;
                            background: var(--jp-layout-color2, #eee); border-radius: 3px;
                            border: 1px solid var(--jp-border-color1, #999); }}
    .qlora-levels > svg {{ width: 100%; overflow: visible; cursor: ew-resize; touch-action: pan-y; user-select: none; }}
    .qlora-levels line {{ stroke: currentColor; stroke-width: 1; }}
    .qlora-levels path {{ fill: var(--jp-brand-color1, #1976d2); stroke: var(--jp-layout-color0, #fff); }}
    .qlora-levels svg svg:focus {{ outline: none; }}
    .qlora-levels svg svg:focus path {{ stroke: var(--jp-ui-font-color0, #000); stroke-width: 3; }}
    .qlora-levels button:focus-visible {{ {FOCUS} }}
    """

    def __init__(self, description, value, *, starts=()):
        named = {name: self.allowed(levels, name) for name, levels in dict(starts).items()}
        super().__init__(description=description, value=self.allowed(value, description), starts=named)

    def allowed(self, value, name=None):
        """Return a sequence or tensor as 16 floats of `shortest`. ValueError names the first wrong level."""
        name = name or self.description
        try:
            table = torch.as_tensor(value, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError, OverflowError):  # words, None, ragged lists, 10**400
            table = torch.empty(0, 0, dtype=torch.float32)
        if table.dim() != 1:  # a scalar, a matrix, or no numbers at all
            short = reprlib.repr(value)
            raise ValueError(f"{name}={short} is not allowed: give {N_LEVELS} ascending numbers in [-1, 1].")
        if len(table) != N_LEVELS:
            raise ValueError(f"{name}: {len(table)} are given: give {N_LEVELS}, ascending, in [-1, 1].")
        try:
            return shortest(check_levels(table))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    @T.validate("value")
    def _check_value(self, proposal):
        return self.allowed(proposal["value"])

    def takes(self, value):
        if not (isinstance(value, list) and all(type(level) in (int, float) for level in value)):
            return False
        try:
            return bool(self.allowed(value))
        except ValueError:
            return False

    def rule(self):
        return f"{N_LEVELS} ascending numbers in [-1, 1]"

    def rounds(self):
        first = list(dict.fromkeys([self.value, *map(tuple, self.starts.values()), *self._moved(0.5)]))
        known = set(first)  # levels close together have no place for quarters
        return [first, [levels for levels in self._moved(0.25, 0.75) if levels not in known]]

    def _moved(self, *shares):
        """List the levels with one of them moved, by each share of its way to either neighbour or to the end."""
        edges = (-1.0, *self.value, 1.0)
        found = []
        for i, level in enumerate(self.value):
            for end in (edges[i], edges[i + 2]):
                moved = (round(level + share * (end - level), 2) for share in shares)
                found += [(*self.value[:i], place, *self.value[i + 1 :]) for place in moved]
        # rounded to hundredths, a level can have met its neighbour, or not have left its place
        return [levels for levels in dict.fromkeys(found) if levels != self.value and _ascends(levels)]

    def __repr__(self):
        return f"Levels({self.description!r}, {self.value!r})"


def _ascends(levels: tuple[float, ...]) -> bool:
    return all(low < high for low, high in zip(levels, levels[1:], strict=False))
