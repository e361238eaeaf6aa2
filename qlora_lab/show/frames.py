"""Many pictures of one explorer in few bytes: small tiles, each stored once, on one sheet of 256 colours.

In: pictures of one size, (height, width, 4) uint8. Out: a Film, which playable.js unpacks. An explorer's pictures share
their background and most of their ink, so from state to state few tiles are new. A video would be smaller still, but
neither exact nor at hand for a still that waits for a key.
"""

import io
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

TILE = 16  # pixels: 8 make a sheet a sixth smaller, and what says where its tiles go twice as large
ACROSS = 64  # tiles on the sheet
SAME, FIRST, NEXT, OLDER = range(4)  # a tile is that of the picture before or of the first one, or new, or an older one


class Film(NamedTuple):
    """sheet: a lossless WebP, tiles in reading order. steps: (n_pictures, n_places) uint32, one of SAME ... for each.

    Lossless WebP is a tenth to a half smaller than deflate here, since it can point to pixels above.
    """

    width: int  # of a picture, in pixels
    height: int
    sheet: bytes
    steps: np.ndarray


class Frames:
    """Pictures to pack, each known by a key of its own."""

    def __init__(self):
        self._numbers: dict[bytes, int] = {}  # tile -> its number; a dict keeps their order
        self._pictures: dict[tuple, np.ndarray] = {}  # key -> (n_places,) numbers of its tiles

    def __contains__(self, key: tuple) -> bool:
        return key in self._pictures

    def add(self, key: tuple, rgba: np.ndarray) -> None:
        """Keep a picture. All must have the same size."""
        self.height, self.width, _ = rgba.shape
        high, wide = (-(-side // TILE) for side in rgba.shape[:2])  # tiles
        pixels = np.zeros((high * TILE, wide * TILE), np.uint32)  # what hangs over the edge stays black
        pixels[: self.height, : self.width] = np.ascontiguousarray(rgba).view(np.uint32)[..., 0]
        tiles = pixels.reshape(high, TILE, wide, TILE).swapaxes(1, 2).reshape(high * wide, TILE * TILE)
        numbers = self._numbers
        # all beside the first picture: most tiles are its own, and only the others are looked up
        if self._pictures:
            first = next(iter(self._pictures.values()))
            found = first.copy()
            changed = np.flatnonzero((tiles != self._first).any(1))
        else:
            self._first = tiles
            found = np.zeros(len(tiles), np.int64)
            changed = range(len(tiles))
        for place in changed:
            found[place] = numbers.setdefault(tiles[place].tobytes(), len(numbers))
        self._pictures[key] = found

    def film(self, keys: Iterable[tuple]) -> Film:
        """Pack some of the pictures, in this order. The first one that was added must be the first."""
        pictures = [self._pictures[key] for key in keys]
        # numbered anew: a page leaves out pictures that were drawn in vain, and their tiles
        order: dict[int, int] = {}  # number here -> number on the film, in order of appearance
        steps = np.zeros((len(pictures), len(pictures[0])), np.uint32)
        before = np.full(len(pictures[0]), -1)
        for step, picture in zip(steps, pictures, strict=True):
            for place in np.flatnonzero(picture != before):
                number = int(picture[place])
                if number not in order:
                    order[number] = len(order)
                    step[place] = NEXT
                elif picture is not pictures[0] and number == pictures[0][place]:
                    step[place] = FIRST
                else:
                    step[place] = OLDER - 1 + len(order) - order[number]  # how long ago: small for a neighbour's
            before = picture
        every = list(self._numbers)
        return Film(self.width, self.height, _sheet([every[number] for number in order]), steps)


def _sheet(tiles: list[bytes]) -> bytes:
    rows = -(-len(tiles) // ACROSS)
    # the last row is filled up
    blank = bytes(len(tiles[0])) * (rows * ACROSS - len(tiles))
    pixels = np.frombuffer(b"".join(tiles) + blank, np.uint8).reshape(rows, ACROSS, TILE, TILE, 4)
    image = Image.fromarray(pixels.swapaxes(1, 2).reshape(rows * TILE, ACROSS * TILE, 4), "RGBX").convert("RGB")
    # as figure.compressed does; with all colours a page would hold three quarters of its states
    few = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).convert("RGB")
    out = io.BytesIO()
    few.save(out, "webp", lossless=True, method=4, quality=75)  # the best effort takes a hundred times as long for 2 %
    return out.getvalue()
