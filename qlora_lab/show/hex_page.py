"""A page of bytes in the reader's hands: `HexPage`, 64 bytes in hexadecimal, one of them chosen by a click or by keys.

To a screen reader it is a slider over 64 positions, whose text names the byte: one thing to focus, instead of 64.
The bytes come from Python; a page may choose one of them, and nothing else.
"""

import traitlets as T

from qlora_lab.show.control import Control
from qlora_lab.show.slider import FOCUS

COLUMNS = 8  # on a narrow page 16 would not fit
N_BYTES = 64  # on a page


class HexPage(Control):
    """64 bytes to choose from. value: the position of the chosen one.

    contents: two hexadecimal digits for each, or an empty text behind the last byte. first: the number of the first.
    together: positions of the bytes that share the chosen one's block.
    Left and right move by a byte, up and down by a row of 8; Home and End go to the ends of the page.
    """

    value = T.Int().tag(sync=True)
    first = T.Int().tag(sync=True)
    contents = T.List(T.Unicode()).tag(sync=True)
    together = T.List(T.Int()).tag(sync=True)
    columns = T.Int(COLUMNS, read_only=True).tag(sync=True)

    _esm = """
    export default { render({ model, el }) {
      const columns = model.get("columns"), cells = [];
      const make = (kind, parent, name) => {
        const made = document.createElement(kind);
        made.className = name; parent.append(made);
        return made;
      };
      el.classList.add("qlora-hex", "qlora-control");
      const head = make("div", el, "head"), shown = make("div", el, "shown"), page = make("div", el, "page");
      head.textContent = model.get("description"); shown.ariaHidden = "true";
      page.tabIndex = 0; page.setAttribute("role", "slider"); page.dataset.lmSuppressShortcuts = "true";
      page.setAttribute("aria-label", model.get("description"));
      page.style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
      model.get("contents").forEach((_, i) => {
        const cell = make("span", page, "cell");
        cell.ariaHidden = "true"; cell.dataset.byte = i;
        cell.addEventListener("click", () => choose(i));
        cells.push(cell);
      });
      page.setAttribute("aria-valuemin", 0); page.setAttribute("aria-valuemax", cells.length - 1);
      const choose = (i) => {
        if (i < 0 || i >= cells.length) return;
        model.set("value", i); model.save_changes(); show();
      };
      page.addEventListener("keydown", (e) => {
        const way = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[e.key];
        const end = { Home: 0, End: cells.length - 1 }[e.key];
        if (way === undefined && end === undefined) return;
        e.preventDefault();
        choose(end ?? model.get("value") + way);
      });
      const show = () => {
        const now = model.get("value"), contents = model.get("contents"), together = model.get("together");
        if (!Array.isArray(contents) || !Array.isArray(together)) return;  // another script can set anything
        cells.forEach((cell, i) => {
          cell.textContent = contents[i] || "\\u00b7\\u00b7";
          cell.classList.toggle("together", together.includes(i));
          cell.classList.toggle("now", i === now);
        });
        const said = contents[now] ? `byte ${model.get("first") + now}: 0x${contents[now]}` : "no byte there";
        shown.textContent = said;
        page.setAttribute("aria-valuenow", now); page.setAttribute("aria-valuetext", said);
      };
      model.on("change:value change:contents change:first change:together", show); show();
    } };
    """
    _css = f"""
    .qlora-hex {{ display: grid; grid-template-columns: 1fr auto; column-gap: 12px; min-width: 0;
                  margin: 2px var(--jp-widgets-margin, 2px) 6px;
                  font-size: var(--jp-ui-font-size1, 13px); color: var(--jp-ui-font-color1, inherit); }}
    .qlora-hex .head {{ font-weight: 600; }}
    .qlora-hex .shown {{ font-variant-numeric: tabular-nums; }}
    .qlora-hex .page {{ grid-column: 1 / -1; display: grid; gap: 1px; margin-top: 4px; cursor: pointer;
                        font-family: var(--jp-code-font-family, monospace); user-select: none; }}
    .qlora-hex .cell {{ text-align: center; padding: 2px 0; border: 1px solid transparent; border-radius: 3px; }}
    .qlora-hex .cell.together {{ background: var(--jp-layout-color2, #eee); }}
    .qlora-hex .cell.now {{ border-color: var(--jp-ui-font-color1, #000); font-weight: 700; }}
    .qlora-hex .page:focus-visible {{ {FOCUS} }}
    """

    def __init__(self, description, value=0):
        super().__init__(description=description, value=self.allowed(value, description), contents=[""] * N_BYTES)

    def show(self, contents, first, together):
        """Show other bytes: a list of 64 texts, the number of the first, and the positions of one block."""
        with self.hold_sync():  # one message
            self.contents = contents
            self.first = first
            self.together = together

    def allowed(self, value, name=None):
        """Return `value` if it is a position on the page. ValueError names the rule if it is not."""
        if not self.takes(value):
            raise ValueError(f"{name or self.description}={value!r} is not allowed: give {self.rule()}.")
        return value

    @T.validate("value")
    def _check_value(self, proposal):
        return self.allowed(proposal["value"])

    def takes(self, value):
        return type(value) is int and 0 <= value < N_BYTES  # True is not 1

    def rule(self):
        return f"a whole number from 0 to {N_BYTES - 1}"

    def rounds(self):
        return [list(range(N_BYTES))]  # keys go from byte to byte

    def __repr__(self):
        return f"HexPage({self.description!r}, {self.value!r})"
