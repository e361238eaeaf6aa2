"""Follow one weight: the map of the course, on which one real weight goes from station to station.

In: a weight, a row and a column. Out: a row of stations to move along by mouse, by keys or with Play; the picture, the
sentence and the notebook of the one that is chosen.

    ql.FollowWeight(lit="04_double_quant")     the weight of notebook 00; without its model, a drawn one
    ql.FollowWeight(weight, 5, 7)              a weight of yours

The page has all pictures from the start, so a step waits for no kernel. Python hears which station is shown.

Not here: the numbers (measure/one_weight.py), the words (weight_stations.py), the drawings (weight_pictures.py).
"""

import base64
import html
import warnings

import ipywidgets as W
import traitlets as T

from qlora_lab.measure.codebook_trial import normal_weights
from qlora_lab.measure.one_weight import MODEL, course_weight, follow
from qlora_lab.show.control import Control
from qlora_lab.show.figure import caption
from qlora_lab.show.play import PLAYER
from qlora_lab.show.playable import save_text, way_page
from qlora_lab.show.slider import FOCUS, RING, Button
from qlora_lab.show.source import details_html
from qlora_lab.show.still import StatusLine, show_over
from qlora_lab.show.weight_pictures import HEIGHT, OURS, WIDTH, Picture
from qlora_lab.show.weight_stations import STATIONS, Station, place_of

DRAWN = 576, 576  # of the weight that is drawn where the course's model is missing: the shape of its matrix
DEVIATION = 0.02  # of it: the weights of trained layers are about as small
# A picture in an <img> takes no ink from its page. It brings a ground of its own, which Chromium turns dark if the
# element's color-scheme is; JupyterLab sets none, so the still does.
_GROUNDS = """<style>:root { color: #111; } rect.ground { fill: #fff; }
@media (prefers-color-scheme: dark) { :root { color: #eee; } rect.ground { fill: #111; } }</style>"""
_SCHEMES = """<style>.qlora-still img[src^="data:image/svg"] { color-scheme: light; }
[data-jp-theme-light="false"] .qlora-still img[src^="data:image/svg"] { color-scheme: dark; }</style>"""


class Way(Control):
    """The stations in a row, and the panel of one of them. place: the number of the station that is shown.

    Left and right move along the row, Home and End to its ends; Enter and the space bar choose, as a click does. To a
    screen reader they are tabs, and the sentence of the panel is read when it changes. Play goes along the row by
    itself, from station to station.
    """

    moved = "place"
    # Only the place comes back from the page. All pictures go there once, 50 KB: a step then needs no kernel, and
    # takes as long as the page takes to draw.
    place = T.Int().tag(sync=True)
    stations = T.List(T.Dict()).tag(sync=True)  # never changes
    size = T.List([WIDTH, HEIGHT], read_only=True).tag(sync=True)

    _esm = (
        PLAYER
        + """
    const SVG = "http://www.w3.org/2000/svg";
    export default { render({ model, el }) {
      const stations = model.get("stations"), id = "qlora-" + Math.random().toString(36).slice(2);
      const make = (kind, parent, name, space) => {
        const made = space ? document.createElementNS(space, kind) : document.createElement(kind);
        made.setAttribute("class", name); parent.append(made);
        return made;
      };
      el.classList.add("qlora-way", "qlora-control");
      const row = make("div", el, "row"), press = make("div", el, "play"), panel = make("div", el, "panel");
      row.setAttribute("role", "tablist"); row.setAttribute("aria-label", model.get("description"));
      panel.id = id; panel.setAttribute("role", "tabpanel");
      const title = make("div", panel, "title"), svg = make("svg", panel, "", SVG);
      svg.setAttribute("viewBox", "0 0 " + model.get("size").join(" ")); svg.setAttribute("role", "img");
      const parts = make("g", svg, "parts", SVG), dot = make("circle", svg, "dot", SVG);
      dot.setAttribute("r", 7);
      const said = make("div", panel, "said"), more = make("div", panel, "more");
      const rider = make("span", row, "rider");                        // the same weight, on the map
      rider.ariaHidden = "true";
      const buttons = stations.map((station, i) => {
        const button = make("button", row, "");
        button.type = "button"; button.id = `${id}-${i}`; button.textContent = station.name;
        button.setAttribute("role", "tab"); button.setAttribute("aria-controls", id);
        button.dataset.lmSuppressShortcuts = "true";
        button.addEventListener("click", () => choose(i));
        return button;
      });
      const go = (i) => { model.set("place", i); model.save_changes(); show(); };
      const choose = (i) => { go(i); buttons[i].focus(); };
      row.addEventListener("keydown", (e) => {
        const now = model.get("place"), last = stations.length - 1;
        const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[e.key];
        if (next === undefined || e.altKey || e.ctrlKey || e.metaKey) return;
        e.preventDefault(); e.stopPropagation();
        choose(Math.min(last, Math.max(0, next)));
      });
      const link = (name) => {
        const a = make("a", more, ""), folders = model.widget_manager?.context?.path?.split("/").slice(0, -1);
        a.textContent = name; a.href = `${name}.ipynb`;
        if (!folders) return;                                          // not JupyterLab, which opens it beside this one
        if (folders.at(-1) === "solutions") folders.pop();
        a.dataset.commandlinkerCommand = "docmanager:open";
        a.dataset.commandlinkerArgs = JSON.stringify({ path: [...folders, `${name}.ipynb`].join("/") });
      };
      const ride = () => {
        const button = buttons[model.get("place")];
        if (button) rider.style.transform =
          `translate(${button.offsetLeft + button.offsetWidth / 2}px, ${button.offsetTop}px)`;
      };
      const show = () => {
        const now = model.get("place"), station = stations[now];
        if (!station) return;                                          // another script can set anything
        buttons.forEach((button, i) => {
          button.setAttribute("aria-selected", i === now); button.tabIndex = i === now ? 0 : -1;
        });
        panel.setAttribute("aria-labelledby", buttons[now].id);
        title.textContent = `${now + 1}. ${station.title}`; svg.setAttribute("aria-label", station.title);
        parts.innerHTML = station.parts;
        dot.style.transform = `translate(${station.mark[0]}px, ${station.mark[1]}px)`;
        said.textContent = station.said;
        more.replaceChildren(`Computed by ${station.function}. Taught in `);
        station.notebooks.forEach((name, i) => { if (i) more.append(", "); link(name); });
        ride();
      };
      const watch = new ResizeObserver(ride);                          // a narrow row wraps
      watch.observe(row);
      model.on("change:place", show); show();
      const ended = () => model.get("place") === stations.length - 1;
      const leave = player({                                           // time to read a sentence and see the picture
        el: press, pace: 3000, around: () => el, ended, ready: () => true,
        step: () => go(ended() ? 0 : model.get("place") + 1),
        playing: (on) => said.setAttribute("aria-live", on ? "off" : "polite"),
      });
      return () => { leave(); watch.disconnect(); };
    } };
    """
    )
    _css = f"""{Button._css}
    .qlora-way {{ max-width: 860px; margin: 2px; color: var(--jp-ui-font-color1, inherit);
                  font-size: var(--jp-ui-font-size1, 13px); line-height: 1.5; }}
    .qlora-way .row {{ position: relative; display: flex; flex-wrap: wrap; gap: 4px 0; padding: {RING}; }}
    .qlora-way .row button {{ position: relative; flex: 1 0 auto; padding: 22px 4px 4px; border: 0; background: none;
                              color: inherit; font: inherit; font-size: max(12px, 0.93em); cursor: pointer; }}
    .qlora-way .row button::before {{ content: ""; position: absolute; top: 5px; left: calc(50% - 5px); width: 6px;
                              height: 6px; border: 2px solid currentColor; border-radius: 50%; z-index: 1;
                              background: var(--jp-layout-color0, canvas); }}
    .qlora-way .row button::after {{ content: ""; position: absolute; top: 9px; left: 0; right: 0; height: 2px;
                              background: currentColor; opacity: 0.35; }}
    .qlora-way .row button:first-of-type::after {{ left: 50%; }}
    .qlora-way .row button:last-of-type::after {{ right: 50%; }}
    .qlora-way .row button[aria-selected="true"] {{ -webkit-text-stroke: 0.03em currentColor; }}
    .qlora-way .row button:focus-visible {{ {FOCUS} border-radius: 3px; }}
    .qlora-way .rider {{ position: absolute; top: 3px; left: -7px; width: 14px; height: 14px; border-radius: 50%;
                         background: {OURS}; z-index: 2; pointer-events: none; }}
    .qlora-way .dot {{ fill: {OURS}; }}
    .qlora-way :is(.rider, .dot) {{ transition: transform 250ms ease-in-out; }}
    @media (prefers-reduced-motion: reduce) {{ .qlora-way :is(.rider, .dot) {{ transition: none; }} }}
    .qlora-way .play {{ margin-top: 8px; }}
    .qlora-way .title {{ margin-top: 10px; font-size: 1.2em; font-weight: 600; }}
    .qlora-way svg {{ display: block; width: 100%; height: auto; fill: currentColor; font-family: inherit; }}
    .qlora-way .said {{ min-height: 3em; }}
    .qlora-way a:any-link {{ color: var(--jp-content-link-color, inherit); }}
    .qlora-way .more {{ font-size: max(12px, 0.93em); overflow-wrap: anywhere; }}
    """

    def allowed(self, value):
        """Return `value` if a station has that number. ValueError names the rule if none has."""
        if not self.takes(value):
            raise ValueError(f"station={value!r} is not allowed: give {self.rule()}.")
        return value

    @T.validate("place")
    def _check_place(self, proposal):
        return self.allowed(proposal["value"])

    def takes(self, value):
        return type(value) is int and 0 <= value < len(STATIONS)  # True is not 1

    def rule(self):
        return f"a whole number from 0 to {len(STATIONS) - 1}"


class FollowWeight:
    """One weight of a matrix, from its float to the page of its adapter's moments: 14 stations, each with a picture.

    weight: (out_features, in_features) float32, bf16 or fp16; None takes the matrix of notebook 00, `course_weight()`,
    or one that is drawn, with a warning, where the model is not on this machine.
    row, column: of the weight that is followed. lit: the station that is shown first, by its name ("block") or by a
    notebook ("03_block_size"). codebook, block_size: as `quantize` takes them, with codes of 4 bits.
    `.station` is the name of the station that is shown, `.seen` has all numbers.
    Raises TypeError for a weight that quantize refuses; ValueError for one that is not a matrix or not finite, for a
    place outside it, for another station, and for codes of another width.

    >>> import torch
    >>> FollowWeight(torch.linspace(-1, 1, 64).view(4, 16), 3, 15, lit="byte")
    Station 7 of 14, byte: Byte 31 is 0xFF: code 15 is its low half, and code 15 the other.
    """

    def __init__(self, weight=None, row=5, column=7, lit="weight", codebook="nf4", block_size=64):
        place = place_of(lit)  # before the numbers: an error comes at once
        if weight is None and (weight := course_weight()) is None:
            fix = f"`qlora-lab fetch {MODEL}` brings the one that the course follows"
            warnings.warn(
                f"this weight is drawn, because the course's model is not on this machine: {fix}", stacklevel=2
            )
            weight = DEVIATION * normal_weights(DRAWN[0] * DRAWN[1]).view(DRAWN)
        self.seen = follow(weight, row, column, codebook, block_size)
        self.pictures = [station.draw(self.seen) for station in STATIONS]
        self._sentences = [station.say(self.seen) for station in STATIONS]
        # strings: a page that is opened late, or twice, gets the same ones
        shown = map(_for_page, STATIONS, self.pictures, self._sentences)
        self.way = Way(description="Follow one weight", place=place, stations=list(shown))
        self.widget = W.VBox([StatusLine(self.way), self.way])
        self.widget.add_class("qlora-live")  # so that still.py hides the still under it

    @property
    def station(self):
        """The name of the station that is shown."""
        return STATIONS[self.way.place].name

    def go(self, lit):
        """Show another station, by its name or by a notebook. ValueError names them all."""
        self.way.place = place_of(lit)

    def summary(self):
        """Return the sentence of the station that is shown: alt text, and the text that nbval compares."""
        place = self.way.place
        return f"Station {place + 1} of {len(STATIONS)}, {self.station}: {self._sentences[place]}"

    def save_html(self, path):
        """Write a page that plays in a browser without a kernel or a network, and begins with the present station.

        Returns its path. Raises what Explorer.save_html raises.
        """
        return save_text(path, way_page(self.way))

    def __repr__(self):
        return self.summary()

    def _repr_mimebundle_(self, include=None, exclude=None):
        """Give a static page the picture of one station and the sentences of all."""
        place = self.way.place
        # JupyterLab drops <svg> from notebooks that it does not trust, and keeps <img>
        source = base64.b64encode(_svg(self.pictures[place]).encode()).decode()
        sentence = self.summary()
        page = (
            f"{_SCHEMES}<div><strong>{place + 1}. {html.escape(STATIONS[place].title)}</strong></div>"
            f'<img alt="{html.escape(sentence)}" style="width:100%;max-width:{WIDTH}px;height:auto" '
            f'src="data:image/svg+xml;base64,{source}">{caption(self._sentences[place])}'
            f"{details_html('All stations', self._list())}<div>Run this cell to play.</div>"
        )
        return {"text/html": page, "text/plain": sentence}

    def _list(self):
        rows = zip(STATIONS, self._sentences, strict=True)
        items = (f"<li><strong>{s.name}</strong>: {html.escape(said)} {_links(s)}</li>" for s, said in rows)
        return f"<ol>{''.join(items)}</ol>"

    def _ipython_display_(self):
        """Show the live view in a notebook, over the picture that stays when it is closed."""
        show_over(self._repr_mimebundle_(), self.widget)


def _for_page(station: Station, picture: Picture, said: str) -> dict:
    # the name that show_source can be given, after an import
    function = station.function
    return {
        "name": station.name,
        "title": station.title,
        "said": said,
        "parts": picture.parts,
        "mark": list(picture.mark),
        "notebooks": list(station.notebooks),
        "function": f"{function.__module__}.{function.__qualname__}",
    }


def _svg(picture: Picture) -> str:
    """Return a whole SVG with its own ground, for where no page gives it ink."""
    x, y = picture.mark
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    dot = f'<circle cx="{x:.4g}" cy="{y:.4g}" r="7" fill="{OURS}"/>'
    # as a shape: the background of an SVG's root is not drawn in every viewer
    ground = f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}"/>'
    return f'{head} font-family="sans-serif" fill="currentColor">{_GROUNDS}{ground}{picture.parts}{dot}</svg>'


def _links(station: Station) -> str:
    return ", ".join(f'<a href="{name}.ipynb">{name}</a>' for name in station.notebooks)
