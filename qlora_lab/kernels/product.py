"""x W^T and g W for a packed W on the CPU: a panel of W is decoded, multiplied while hot, and its memory used again.

In: x (tokens, columns), or g (tokens, rows); W (rows, columns) as a PackedWeight. Out: (tokens, rows), or (tokens,
columns), dtype of x or g: float32, bf16 or fp16. Twins of x @ dequantize(W).t() and g @ dequantize(W), up to the order
of the sums: every output is one float32 sum, rounded once. The weight is rounded to bf16 only where bf16 products are
faster.

Either takes a product of two thin matrices, such as an adapter, to add to the weight: x (W^T + down up), twin
x @ dequantize(W).t() + x @ down @ up. The thin products run in float32 whichever routine multiplies the weight, so what
an adapter learns is not rounded to bf16 on one maker's processors alone. x is widened once for both, and the float32
sums are added before they are rounded. Only where bf16 products win, torch returns the base's sum already rounded, and
thin.py multiplies, which widens x in registers.

The panel is the only decoded weight in memory: PANEL float32 for each Python thread, allocated once. Nothing else is
allocated but the result, and what oneDNN returns for a panel. A few tokens need no panel (few_tokens.py).

The routine that multiplies is found by a race, once per process, because no CPU flag tells: with AVX512-BF16, bf16
products took a quarter of float32's time on an AMD Zen 5 and twice its time on an Intel Sapphire Rapids without AMX.
Where float32 is faster, bf16 is widened, a tile of tokens at a time, and rounded at the end. The environment variable
QLORA_LAB_PRODUCTS names the winner (float32, onednn or bfloat16) without a race, so that several machines choose alike.
The same race chooses the routine for a few tokens, so that a run records one choice and all its tokens round alike.
"""

import os
import threading
from functools import lru_cache, partial
from math import gcd
from time import perf_counter
from typing import NamedTuple

import torch

from qlora_lab.kernels import cpu, few_tokens, thin as in_registers
from qlora_lab.kernels.packed_weight import PackedWeight

OVERRIDE = "QLORA_LAB_PRODUCTS"
# 16 MiB of float32: BLAS loses an eighth of its speed on panels half as large. Of bf16 as many bytes, so twice as many
# elements: each row of a panel of columns is a jump in memory, so wide panels decode faster.
PANEL = 2**22
TILE = 2**21  # elements of x or g that are widened to float32 at a time: 8 MiB; 32 was not faster
_local = threading.local()
_kept: list["Race"] = []


class Thin(NamedTuple):
    """A product of two thin float32 matrices to add to the weight. low receives x down, which `outer` needs."""

    down: torch.Tensor  # (x.shape[1], r)
    up: torch.Tensor  # (r, size of the result)
    low: torch.Tensor  # (tokens, r), written


class Race(NamedTuple):
    """Seconds of one product by each routine, the best of several rounds."""

    float32: float
    onednn: float  # float32 by oneDNN's linear; infinity where torch lacks it
    bfloat16: float

    @property
    def use_onednn(self) -> bool:
        """Whether it takes two thirds of the time or less: near a tie, results would depend on luck."""
        return self.onednn < self.float32 / 1.5

    @property
    def use_bfloat16(self) -> bool:
        """The same, against the faster of the float32 routines."""
        return self.bfloat16 < min(self.float32, self.onednn) / 1.5

    @classmethod
    def won_by(cls, name: str) -> "Race":
        """Make up a race that the routine of this name wins."""
        return cls(**{field: 1.0 if field == name else 9.0 for field in cls._fields})


def race() -> Race:
    """Return the race that was kept, else the one that the environment decides, else run one.

    Raises ValueError if the environment names an unknown winner, or one that this build of torch lacks.
    """
    if _kept:
        return _kept[-1]
    return _decided(os.environ[OVERRIDE]) if os.environ.get(OVERRIDE) else _timed()


def keep(race: Race) -> None:
    """Keep `race`, such as that of the process in which a run began."""
    _kept.append(race)


@lru_cache
def _decided(winner: str) -> Race:
    if winner not in Race._fields:
        raise ValueError(f"{OVERRIDE}={winner!r} is not known: leave it unset, or choose {', '.join(Race._fields)}")
    if winner == "onednn" and not _has_onednn():
        raise ValueError(f"{OVERRIDE}=onednn needs oneDNN, which torch lacks here: choose float32 or bfloat16")
    return Race.won_by(winner)


@lru_cache
def _timed() -> Race:
    """Time 512 x 1024 by 1024 x 1024 in up to nine rounds, a fraction of a second, once per process."""
    contenders = {
        "float32": (torch.float32, _blas),
        "onednn": (torch.float32, _onednn if _has_onednn() else None),
        "bfloat16": (torch.bfloat16, _blas),
    }
    best = dict.fromkeys(contenders, float("inf"))  # seconds
    for _ in range(9):
        for name, (dtype, routine) in contenders.items():
            if routine and (best[name] == float("inf") or best[name] < 5 * best["float32"]):  # bf16 can be that slow
                best[name] = min(best[name], _seconds(routine, dtype))
    return Race(**best)


def _seconds(routine, dtype: torch.dtype) -> float:
    shapes = (512, 1024), (1024, 1024), (512, 1024)  # about a layer of a small model; smaller ones time the call
    x, panel, out = (torch.ones(shape, dtype=dtype, device="cpu") for shape in shapes)
    start = perf_counter()
    routine(x, panel, out)
    return perf_counter() - start


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _blas(x: torch.Tensor, panel: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(x, panel.t(), out=out)


def _onednn(x: torch.Tensor, panel: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(torch.ops.mkldnn._linear_pointwise(x, panel, None, "none", [], ""))


def _buffer(name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return a matrix over memory that this thread keeps, so that no step pays for fresh pages."""
    numel = shape[0] * shape[1]
    kept = getattr(_local, name, None)
    if kept is None or kept.nbytes < numel * dtype.itemsize:
        with torch.inference_mode(False):  # what is made inside could not be written to outside
            kept = torch.empty(numel * dtype.itemsize, dtype=torch.uint8, device="cpu")
        setattr(_local, name, kept)
    return kept[: numel * dtype.itemsize].view(dtype).view(shape)


def panel_height(columns: int, block_size: int = 1, narrow: bool = False) -> int:
    """Rows of W that `forward` decodes at a time: PANEL elements at most, and whole blocks if that is possible.

    narrow: the panel is in bf16, and holds twice as many.
    """
    height = max(1, (PANEL << narrow) // columns)
    unit = block_size // gcd(block_size, columns)  # rows after which a block starts again
    return height - height % unit if height > unit else height


def panel_width(rows: int, columns: int, block_size: int, narrow: bool = False) -> int:
    """Columns of W that `backward` decodes at a time; see panel_height."""
    numel = PANEL << narrow
    width = columns if rows * columns <= numel else max(1, numel // rows)
    return width - width % block_size if width > block_size else width


def forward(x: torch.Tensor, weight: PackedWeight, rows: int, thin: Thin | None = None) -> torch.Tensor:
    """Multiply by W^T: (tokens, columns) -> (tokens, rows)."""
    columns = x.shape[1]  # of W
    if len(x) <= few_tokens.MAX_TOKENS and few_tokens.can_multiply(columns, weight):
        # Asked in this order, so that a processor without the instruction runs no race for it.
        pairs = x.dtype == torch.bfloat16 and few_tokens.can_pair(weight) and race().use_bfloat16
        if thin is None:
            return few_tokens.multiply_blocks(x, weight, rows, pairs)
        # An adapter stays in float32, whichever routine multiplies the base.
        wide = _widened(x)  # (tokens, columns) float32
        source = x if pairs else wide
        product = few_tokens.multiply_blocks(source, weight, rows, pairs, torch.float32)  # the same sums, not rounded
        return product.addmm_(torch.mm(wide, thin.down, out=thin.low), thin.up).to(x.dtype)

    def panel_of(first: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        panel = _buffer("panel", (stop - first, columns), dtype)
        cpu.dequantize_blocks(weight, panel, first * columns)  # rows lie side by side in memory: one run
        return panel

    return _by_panels(x, rows, panel_height(columns, weight.block_size, _is_narrow(x)), panel_of, thin)


def backward(grad: torch.Tensor, weight: PackedWeight, columns: int, thin: Thin | None = None) -> torch.Tensor:
    """Multiply by W: (tokens, rows) -> g W, (tokens, columns)."""
    rows = grad.shape[1]  # of W

    def panel_of(first: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        # By columns, so that each output is a whole sum over the rows: a panel of rows would have to be added up in
        # the dtype of g, or in float32 memory of its own.
        panel = _buffer("panel", (rows, stop - first), dtype)
        whole = stop - first == columns  # one run, as in forward
        cpu.dequantize_blocks(weight, panel, first, 0 if whole else columns)
        return panel.t()  # a view: BLAS reads either order

    return _by_panels(grad, columns, panel_width(rows, columns, weight.block_size, _is_narrow(grad)), panel_of, thin)


def forward_unpacked(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x W^T in float32, (tokens, rows), for a bf16 or fp16 weight (rows, columns) that is not packed.

    A panel of W is widened, multiplied while hot, and its memory used again: no float32 copy of W exists.
    """
    return _by_panels(x.float(), len(weight), panel_height(weight.shape[1]), partial(_widened_panel, weight), None)


def backward_unpacked(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return g W in float32, (tokens, columns), from g (tokens, rows) float32; see forward_unpacked."""
    total = grad.new_zeros(len(grad), weight.shape[1])  # (tokens, columns)
    height = panel_height(weight.shape[1])
    for first in range(0, len(weight), height):
        stop = min(first + height, len(weight))
        total.addmm_(grad[:, first:stop], _widened_panel(weight, first, stop, torch.float32))
    return total


def _widened_panel(weight: torch.Tensor, first: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    return _buffer("panel", (stop - first, weight.shape[1]), dtype).copy_(weight[first:stop])


def outer(low: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return low^T x in float32, (r, columns), an adapter's gradient, from low (tokens, r) float32 and x."""
    if in_registers.can_multiply(x, x.shape[1], low.shape[1]) and race().use_bfloat16:
        return in_registers.outer(low, x)
    total = low.new_zeros(low.shape[1], x.shape[1])  # (r, columns)
    tile = max(1, TILE // x.shape[1])  # tokens
    for some_low, some in zip(low.split(tile), x.split(tile), strict=True):
        total.addmm_(some_low.t(), _widened(some))
    return total


def _is_narrow(x: torch.Tensor) -> bool:
    """Whether x is multiplied in bf16, and W decoded to it."""
    return x.dtype == torch.bfloat16 and race().use_bfloat16


def _widened(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float32 else _buffer("wide", x.shape, torch.float32).copy_(x)


def _add_thin(out: torch.Tensor, x: torch.Tensor, thin: Thin) -> None:
    """Add x down up, computed in float32, to `out` (tokens, size), a tile of tokens at a time."""
    if in_registers.can_multiply(x, out.shape[1], len(thin.up)):
        in_registers.lower(x, thin.down, thin.low)
        in_registers.add(out, thin.low, thin.up)
        return
    tile = max(1, TILE // max(x.shape[1], out.shape[1]))
    for rows, some, low in zip(out.split(tile), x.split(tile), thin.low.split(tile), strict=True):
        torch.mm(_widened(some), thin.down, out=low)
        if rows.dtype == torch.float32:
            rows.addmm_(low, thin.up)
        else:
            rows.copy_(_buffer("product", rows.shape, torch.float32).copy_(rows).addmm_(low, thin.up))


def _by_panels(x: torch.Tensor, size: int, step: int, panel_of, thin: Thin | None) -> torch.Tensor:
    """Multiply x by each panel_of(first, stop), (step, x.shape[1]), side by side, and add x down up: (len(x), size)."""
    out = torch.empty(len(x), size, dtype=x.dtype, device="cpu")  # (tokens, size)
    multiply = _onednn if x.dtype == torch.float32 and race().use_onednn else _blas
    if x.dtype == torch.float32 or _is_narrow(x):
        for first in range(0, size, step):
            stop = min(first + step, size)
            multiply(x, panel_of(first, stop, x.dtype), out[:, first:stop])
        if thin is not None:
            _add_thin(out, x, thin)
        return out
    # A tile of tokens is widened and meets every panel before the next one, so W is decoded once per tile: TILE is
    # large enough that decoding stays a small part, and small enough that float32 copies of x and out stay small.
    tile = max(1, TILE // max(x.shape[1], min(step, size)))
    for start in range(0, len(x), tile):
        wide = _widened(x[start : start + tile])  # (tile, x.shape[1])
        if thin is not None:
            low = torch.mm(wide, thin.down, out=thin.low[start : start + tile])  # (tile, r)
        for first in range(0, size, step):
            stop = min(first + step, size)
            product = _buffer("product", (len(wide), stop - first), torch.float32)
            multiply(wide, panel_of(first, stop, torch.float32), product)
            if thin is not None:
                product.addmm_(low, thin.up[:, first:stop])
            out[start : start + tile, first:stop] = product  # rounds
    return out
