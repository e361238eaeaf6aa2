"""A button that plays a slider: it takes the next of the slider's values, again and again, and the picture follows.

In: presses, and the page's clock. Out: values of the slider. The page asks for the next value when the picture of the
one before is there, so a slow kernel plays slowly and nothing waits in a queue. Any other control of the explorer stops
it. Where the reader's system asks for reduced motion, a press takes a single step.
"""

import traitlets as T

from qlora_lab.show.control import Control
from qlora_lab.show.slider import Button, Slider

# The page's part of it, which the map of the course shares (follow_weight.py): a button in `el` that calls step() at
# once and then every `pace` milliseconds, if ready() says that the picture before is there, until ended(). Whatever
# the reader does elsewhere in `around` stops it. playing() is told whether it plays: a screen reader cannot keep up.
PLAYER = """
    const player = ({ el, around, pace, step, ready, ended, playing }) => {
      const button = document.createElement("button"), calm = matchMedia("(prefers-reduced-motion: reduce)");
      const events = ["click", "input", "keydown"];
      let clock = null;
      el.classList.add("qlora-button");                              // it looks like Button
      button.type = "button"; button.dataset.lmSuppressShortcuts = "true";
      el.append(button);
      const name = () => {
        button.textContent = clock ? "Pause" : calm.matches ? "Step" : "Play";
        playing(clock !== null);
      };
      const stop = () => { clearInterval(clock); clock = null; name(); };
      const turn = () => {
        if (el.closest("[inert]") || ended()) stop();
        else if (ready()) {
          step();
          if (ended()) stop();
        }
      };
      button.addEventListener("click", () => {
        if (clock) return stop();
        step();
        if (!calm.matches) clock = setInterval(turn, pace);
        name();
      });
      const elsewhere = ({ target }) => {
        if (clock && !el.contains(target) && around()?.contains(target)) stop();
      };
      for (const event of events) document.addEventListener(event, elsewhere, true);
      calm.addEventListener("change", stop);
      name();
      return () => {
        stop(); calm.removeEventListener("change", stop);
        for (const event of events) document.removeEventListener(event, elsewhere, true);
      };
    };
"""


class Play(Control):
    """A button that moves `slider` to its last value; at the end it starts from the first one.

    ticks: the moves that the page has asked for. shown: the last of them that was drawn.
    """

    moved = "ticks"
    ticks = T.Int(0).tag(sync=True)  # the browser counts
    shown = T.Int(0).tag(sync=True)
    last = T.Bool(False).tag(sync=True)  # no value follows

    _esm = (
        PLAYER
        + """
    export default { render({ model, el }) {
      el.classList.add("qlora-control");
      return player({
        el, pace: 250, around: () => el.closest(".qlora-explorer"),
        step: () => { model.set("ticks", model.get("ticks") + 1); model.save_changes(); },
        ready: () => model.get("shown") === model.get("ticks"),      // else its picture is still to come
        ended: () => model.get("last"),
        playing: (on) => {
          const said = el.closest(".qlora-explorer")?.querySelector(".said");  // of a saved page
          said?.setAttribute("aria-live", on ? "off" : "polite");
        },
      });
    } };
    """
    )
    _css = Button._css

    def __init__(self, slider: Slider):
        super().__init__(description=f"Play {slider.description}", last=_is_last(slider))
        self._slider = slider
        slider.observe(self._look, "position")

    @T.observe("ticks")
    def _tick(self, change):
        slider = self._slider
        slider.position = 0 if _is_last(slider) else slider.position + 1  # its observers draw before the next line
        self.shown = change["new"]

    def _look(self, _change):
        self.last = _is_last(self._slider)

    def takes(self, value):
        return type(value) is int and self.ticks <= value < 2**53  # beyond it JavaScript cannot add 1

    def rule(self):
        return f"a whole number of at least {self.ticks}"

    def __repr__(self):
        return f"Play({self._slider.description!r})"


def _is_last(slider: Slider) -> bool:
    return slider.position == len(slider.choices) - 1
