"""What stands in front of the products of a prompt, a token at a time: a norm, a gate, and the rounding to int8.

In: rows of tokens, float32. Out: the same rows as the products read them: in tiles of tokens, rounded to int8
(int8_products.py) or float32 (float_products.py), or as they are. Twin of what infer/step.py does between its products.

A row passes the first-level cache once. In separate steps, norms, gates and sums took an int8 prompt of SmolLM2-135M a
tenth of its time, and q, k and v each rounded the same rows.
"""

from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange

from qlora_lab.kernels import int8_products, vector as v
from qlora_lab.kernels.compiled import parallel, run
from qlora_lab.kernels.decode_step import gate, norm
from qlora_lab.kernels.elements import INFINITY, MAGNITUDE
from qlora_lab.kernels.int8_products import SIZE

AS_IT_IS, NORM, GATE = range(3)  # what happens to a row first
_NONE, _NO_WEIGHT = np.empty((0, 0), np.float32), np.empty(0, np.float32)


class Rows(NamedTuple):
    """The input of products, in the forms that they ask for; a form that nobody asks for is empty."""

    plain: torch.Tensor  # (tokens, columns) float32; adapters and weights that are not packed read it
    tiles: np.ndarray  # flat float32: (tiles, columns, tokens of a tile), zeros behind the last token
    numbers: int8_products.Numbers


class Room:
    """Memory for `tokens` tokens, used again by each layer: fresh pages take as long as what is written to them."""

    def __init__(self, tokens: int):
        self.tokens, self.tiles = tokens, -(-tokens // SIZE)
        self.filled = self.tiles * SIZE  # whole tiles: the kernels know no shorter one
        self._rows: dict[tuple, Rows] = {}
        self._out: dict[int, torch.Tensor] = {}

    def rows(self, columns: int, forms: frozenset[str]) -> Rows:
        """Return Rows with these forms, names of its fields; those of the last call for this size are overwritten."""
        if (columns, forms) not in self._rows:
            size = (self.tokens, columns) if "plain" in forms else (0, 0)
            plain = torch.empty(size, dtype=torch.float32, device="cpu")
            tiles = np.zeros(self.filled * columns if "tiles" in forms else 0, np.float32)
            numbers = int8_products.room_for(self.tiles if "numbers" in forms else 0, columns)
            self._rows[columns, forms] = Rows(plain, tiles, numbers)
        return self._rows[columns, forms]

    def out(self, width: int) -> torch.Tensor:
        """Return (whole tiles of tokens, width) float32 for a product, the same for each of this width."""
        if width not in self._out:
            self._out[width] = torch.empty(self.filled, width, dtype=torch.float32, device="cpu")
        return self._out[width]


@njit
def _first(what, x, more, weight, eps, token, row):
    """Write what the products of a token read into row (1, columns). Returns whether x is finite, if it is a sum."""
    some = x[token : token + 1]
    top = v.splat(0)  # bits of floats are ordered as floats are
    if what == GATE:
        gate(some, row)
    elif what == NORM:
        if len(more):  # but for the first layer, into which nothing was added yet
            values, others = x[token], more[token]
            for i in range(0, len(values), 16):
                total = v.load(values, i) + v.load(others, i)
                top = v.larger(top, v.as_ints(total) & v.splat(MAGNITUDE))
                v.store(values, i, total)
        norm(some, weight, eps, row)
    else:
        for i in range(row.shape[1]):
            row[0, i] = some[0, i]
    return v.largest(top) < INFINITY  # NaN comes behind it


@parallel
def _prepare(what, x, more, weight, eps, columns, plain, tiles, numbers, finite):
    """Fill those of plain, tiles and numbers that are not empty, and finite (tiles,)."""
    rounded, scales, starts = numbers
    for tile in prange((len(x) + SIZE - 1) // SIZE):
        row, codes = np.empty((1, columns), np.float32), int8_products.room_for_block()
        finite[tile] = True  # one for each tile: threads that write to one place would wait for each other
        for token in range(tile * SIZE, min((tile + 1) * SIZE, len(x))):
            finite[tile] &= _first(what, x, more, weight, eps, token, row)
            if len(plain):
                for i in range(columns):
                    plain[token, i] = row[0, i]
            if len(tiles):
                place = tile * SIZE * columns + token % SIZE  # numbers of a column lie side by side
                for i in range(columns):
                    tiles[place + i * SIZE] = row[0, i]
            if len(rounded):
                int8_products.round_row(row[0], token, codes, rounded, scales, starts)


def _prepare_rows(room, what, x, rows, columns, more=_NONE, weight=_NO_WEIGHT, eps=0.0) -> bool:
    finite = np.empty(room.tiles, np.bool_)
    # numba compiles one function for all three uses: the arrays that a use does not have are empty
    given = what, x.numpy(), more, weight, np.float32(eps), columns
    run(_prepare, *given, rows.plain.numpy(), rows.tiles, tuple(rows.numbers), finite)
    return bool(finite.all())


def as_they_are(x: torch.Tensor, room: Room, forms: frozenset[str]) -> Rows:
    """Return x (tokens, columns) in these forms."""
    rows = room.rows(x.shape[1], forms)
    _prepare_rows(room, AS_IT_IS, x, rows, x.shape[1])
    return rows


def normed(
    x: torch.Tensor, more: torch.Tensor | None, norm: tuple[torch.Tensor, float], room: Room, forms: frozenset[str]
) -> tuple[Rows, bool]:
    """Add `more` (at least tokens, columns) to x (tokens, columns) in place, and return the norm of the sums' rows.

    norm: its weight (columns,) float32 and eps. Returns, too, whether the sums are finite.
    """
    rows = room.rows(x.shape[1], forms)
    weight, eps = norm
    added = _NONE if more is None else more.numpy()
    return rows, _prepare_rows(room, NORM, x, rows, x.shape[1], added, weight.numpy(), eps)


def gated(gate_and_up: torch.Tensor, room: Room, forms: frozenset[str]) -> Rows:
    """Return silu(gate) * up for gate_and_up (at least tokens, 2 columns), which lie side by side."""
    columns = gate_and_up.shape[1] // 2
    rows = room.rows(columns, forms)
    _prepare_rows(room, GATE, gate_and_up[: room.tokens], rows, columns)
    return rows
