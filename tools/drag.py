"""Draw docs/drag.gif: the levels of NormalFloat while a hand drags the explorer's "offset" control.

    python -m tools.drag

In: frames of NormalFloatExplorer, the control that notebook 01 has. Out: an animated GIF with its own palette.
"""

import io
from pathlib import Path

from PIL import Image

from qlora_lab.quant.codebook import normal_offset
from qlora_lab.show.figure import COLOURS
from qlora_lab.show.normal_float import NormalFloatExplorer

GIF = Path(__file__).resolve().parents[1] / "docs" / "drag.gif"
WIDTH = 720  # pixels
INKS = [*(COLOURS[name] for name in ("black", "blue", "orange")), (0.8, 0.8, 0.8)]  # the last is NF4's ghost
SHADES = [1, 0.8, 0.6, 0.4, 0.2]  # of each ink on white: the edges of lines and letters
FRAME = 120  # milliseconds
REST = 1200  # milliseconds at NF4's own offset, so that an eye finds it


def offsets() -> list[float]:
    """Where the control stands in each frame: from NF4's offset to the left end, to the right end, and back."""
    start = normal_offset(4)
    down = [0.95, 0.93, 0.91, 0.89, 0.87, 0.85, 0.83, 0.81]
    up = [*reversed(down), start, 0.975, 0.98, 0.985, 0.99, 0.995]
    return [start, *down, *up, 0.99, 0.985, 0.98, 0.975]


def frame(explorer: NormalFloatExplorer, offset: float) -> Image.Image:
    """The explorer's picture at one offset."""
    explorer.set(offset=offset)
    picture = Image.open(io.BytesIO(explorer.png)).convert("RGB")
    size = (WIDTH, round(picture.height * WIDTH / picture.width))
    return picture.resize(size, Image.Resampling.LANCZOS)


def palette() -> Image.Image:
    """White and the inks in their shades: one palette for all frames, so that a frame stores only what moved.

    A palette that Pillow finds in the first frame shows the blue and the grey in other colours.
    """
    colours = [(1, 1, 1), *([1 + (part - 1) * shade for part in ink] for ink in INKS for shade in SHADES)]
    picture = Image.new("P", (1, 1))
    picture.putpalette([round(255 * part) for colour in colours for part in colour])
    return picture


def main() -> None:
    """Write the GIF."""
    explorer = NormalFloatExplorer()
    positions = offsets()
    pictures = [frame(explorer, offset) for offset in positions]
    first, *rest = [picture.quantize(palette=palette(), dither=Image.Dither.NONE) for picture in pictures]
    times = [REST if offset == positions[0] else FRAME for offset in positions]
    first.save(GIF, save_all=True, append_images=rest, duration=times, loop=0, optimize=True)


if __name__ == "__main__":
    main()
