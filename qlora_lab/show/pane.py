"""The picture of a live view, and the lines below it, which change in place: the page neither flickers nor jumps.

The bytes of the PNG go to the browser as they are, and the module there turns them into a `data:` address: an object
URL takes 4 to 8 ms longer to load (LOG.md). As HTML each new picture would be a new element, which has no height until
it is decoded.

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
    const address = (png) => {
      const bytes = new Uint8Array(png.buffer, png.byteOffset, png.byteLength), part = 0x8000;  // arguments of one call
      let text = "";
      for (let i = 0; i < bytes.length; i += part) text += String.fromCharCode(...bytes.subarray(i, i + part));
      return `data:image/png;base64,${btoa(text)}`;
    };
    export default { render({ model, el }) {
      const [place, below] = [0, 1].map(() => document.createElement("div")), image = document.createElement("img");
      el.classList.add("qlora-pane");
      place.className = "qlora-picture"; place.append(image);
      el.append(place, below);
      let open = false;
      const show = () => {
        const details = below.querySelector("details");
        if (details) open = details.open;                              // as the reader left it; a state may have none
        image.alt = model.get("alt"); image.style.minWidth = `${model.get("least")}px`;
        image.src = address(model.get("png"));
        below.innerHTML = model.get("below");
        if (open) below.querySelector("details")?.setAttribute("open", "");
      };
      model.on("change", show); show();
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
