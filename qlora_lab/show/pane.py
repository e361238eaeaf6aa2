"""The picture of a live view, and the lines below it, which change in place: the page neither flickers nor jumps.

The bytes of the PNG go to the browser as they are. As HTML each new picture would be a new element, which has no height
until it is decoded.

Not here: the still that stays when a notebook is closed (still.py).
"""

import traitlets as T

from qlora_lab.show.control import Shown
from qlora_lab.show.figure import DARK, least_width


class Pane(Shown):
    """A PNG with its alt text, and HTML below it."""

    png = T.Bytes().tag(sync=True)
    alt = T.Unicode().tag(sync=True)
    least = T.Int().tag(sync=True)  # CSS pixels: a narrower page scrolls the picture
    below = T.Unicode().tag(sync=True)

    _esm = """
    export default { render({ model, el }) {
      const [place, below] = [0, 1].map(() => document.createElement("div")), image = document.createElement("img");
      el.classList.add("qlora-pane");
      place.className = "qlora-picture"; place.append(image);
      el.append(place, below);
      let open = false;
      const show = () => {
        const before = image.src, details = below.querySelector("details");
        if (details) open = details.open;                              // as the reader left it; a state may have none
        image.alt = model.get("alt"); image.style.minWidth = `${model.get("least")}px`;
        image.src = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
        URL.revokeObjectURL(before);
        below.innerHTML = model.get("below");
        if (open) below.querySelector("details")?.setAttribute("open", "");
      };
      model.on("change", show); show();
      return () => URL.revokeObjectURL(image.src);
    } };
    """
    _css = f"""
    .qlora-pane {{ margin: 2px; }}  /* as ipywidgets have */
    .qlora-pane .qlora-picture {{ overflow-x: auto; }}
    .qlora-pane img {{ max-width: 100%; height: auto; }}
    {DARK}
    """

    def show(self, png, alt, below=""):
        """Change all in one message."""
        with self.hold_sync():
            self.png = png
            self.least = least_width(png)
            self.alt = alt
            self.below = below
