"""The picture of a live view, and the lines below it, which change in place: the page neither flickers nor jumps.

The bytes of the PNG go to the browser as they are. As HTML each new picture would be a new element, which has no height
until it is decoded.

Not here: the still that stays when a notebook is closed (still.py).
"""

import traitlets as T

from qlora_lab.show.control import Shown


class Pane(Shown):
    """A PNG with its alt text, and HTML below it."""

    png = T.Bytes().tag(sync=True)
    alt = T.Unicode().tag(sync=True)
    below = T.Unicode().tag(sync=True)

    _esm = """
    export default { render({ model, el }) {
      const image = document.createElement("img"), below = document.createElement("div");
      el.classList.add("qlora-pane");
      el.append(image, below);
      const show = () => {
        const before = image.src;
        image.alt = model.get("alt");
        image.src = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
        URL.revokeObjectURL(before);
        below.innerHTML = model.get("below");
      };
      model.on("change", show); show();
      return () => URL.revokeObjectURL(image.src);
    } };
    """
    _css = """
    .qlora-pane { margin: 2px; }  /* as ipywidgets have */
    .qlora-pane img { max-width: 100%; height: auto; }
    """

    def show(self, png, alt, below=""):
        """Change all in one message."""
        with self.hold_sync():
            self.png = png
            self.alt = alt
            self.below = below
