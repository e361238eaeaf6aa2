"""What playable.js draws from a Film is what went in: here a decoder in Python, by the words of frames.py."""

import io

import numpy as np
import pytest
from PIL import Image

from qlora_lab.show.frames import ACROSS, FIRST, NEXT, OLDER, SAME, TILE, Frames


def decoded(film):
    """(n_pictures, height, width, 3) uint8."""
    sheet = np.asarray(Image.open(io.BytesIO(film.sheet)).convert("RGB"))
    tiles = sheet.reshape(-1, TILE, ACROSS, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
    wide = -(-film.width // TILE)
    pictures, numbers, known = [], [], 0
    for steps in film.steps.tolist():
        now = []
        for place, step in enumerate(steps):
            if step == SAME:
                now.append(numbers[-1][place])
            elif step == FIRST:
                now.append(numbers[0][place])
            elif step == NEXT:
                now.append(known)
                known += 1
            else:
                now.append(known - step + OLDER - 1)
        numbers.append(now)
        picture = tiles[now].reshape(-1, wide, TILE, TILE, 3).swapaxes(1, 2).reshape(-1, wide * TILE, 3)
        pictures.append(picture[: film.height, : film.width])
    return np.stack(pictures)


def drawn(seed, height, width):
    """A white picture with some rectangles of five colours."""
    random = np.random.default_rng(seed)
    rgba = np.full((height, width, 4), 255, np.uint8)
    for _ in range(seed):
        (y, x), colour = random.integers(0, (height, width)), random.integers(0, 5)
        rgba[y : y + 20, x : x + 30, :3] = (50 * colour, 0, 200)
    return rgba


@pytest.mark.parametrize(("height", "width"), [(64, 96), (65, 97), (15, 3)])
def test_pictures_come_back(height, width):
    pictures = [drawn(seed, height, width) for seed in (2, 7, 0, 7, 3)]
    frames = Frames()
    for number, picture in enumerate(pictures):
        frames.add((number,), picture)
    film = frames.film([(number,) for number in range(5)])
    assert np.array_equal(decoded(film), np.stack(pictures)[..., :3])
    some = frames.film([(0,), (4,), (3,)])
    assert np.array_equal(decoded(some), np.stack([pictures[i] for i in (0, 4, 3)])[..., :3])


def test_a_picture_that_was_there_costs_no_tile():
    frames = Frames()
    for number in range(20):
        frames.add((number,), drawn(number % 2 + 4, 64, 96))
    film = frames.film([(number,) for number in range(20)])
    assert not (film.steps[2:] == NEXT).any()
