"""The 16 levels: a codebook is a small float32 table, and a 4-bit code is an index into it.

In: a name ("nf4") or a recipe (bits, offset). Out: levels, (2^bits,) float32, within [-1, 1].
Source: QLoRA (arXiv 2305.14314) section 3. NF4's values come from the authors' code. The paper's equation 4 cannot give
them: as printed, its lowest level is a mean with the quantile of 0, which is infinite; with probabilities from 0 to 1,
so is its highest.

NormalFloat puts levels at quantiles of a normal distribution, as weights look normal (notebook 01 derives it in full):
  1. The quantile of 1 is infinite, so the outermost probability, `offset`, stops half a bin before 1. It is the mean of
     two rules, for 2^k - 1 bins and for 2^k bins. For k = 4 that is (29/30 + 31/32) / 2 = 0.96770833..., which the
     authors rounded to seven digits.
  2. Zero is exact, because padding and dead weights are zero: 2^(k-1) levels above it and 2^(k-1) - 1 below.
  3. All levels are divided by the largest, so that they span exactly [-1, 1].

But: "each bin is used equally often" is false after absmax scaling and rounding to nearest; notebook 01 measures it.
"""

from functools import lru_cache
from reprlib import repr as short

import torch

# |level| of FP4 exactly as bitsandbytes stores it, in twelfths, ordered by the three low bits of the code. Its source
# calls this E2M1, but E2M1 in twelfths is 0 1 2 3 4 6 8 12 (see fp4 against e2m1 in notebook 06).
_FP4_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3)


def normal_float(bits: int = 4, offset: float | None = None, symmetric: bool = False) -> torch.Tensor:
    """NormalFloat levels for `bits` bits, ascending.

    offset: outermost quantile, between 0.5 and 1; None takes the rule of the module docstring (0.9677083 for 4 bits).
    symmetric: as many positive levels as negative ones, 2^bits - 1 in all; one code is then never used.
    Returns (2^bits,) float32, or (2^bits - 1,) when symmetric. Raises ValueError for other bits or offsets.

    >>> normal_float(2).tolist()
    [-1.0, 0.0, 0.43581822514533997, 1.0]
    """
    from scipy.special import ndtri  # scipy.stats' norm.ppf calls it, but takes half a second to import

    if bits not in range(2, 9):
        raise ValueError(f"bits={bits!r} is not supported: choose a whole number from 2 to 8")
    offset = normal_offset(bits) if offset is None else offset
    if not 0.5 < offset < 1:
        raise ValueError(f"offset={offset!r} must lie between 0.5 and 1, both excluded: it is a probability")
    n_negative = 2 ** (bits - 1) - 1
    n_positive = n_negative if symmetric else n_negative + 1

    def side(n: int) -> torch.Tensor:  # n quantiles from `offset` down to, but without, the median
        probabilities = evenly_spaced(offset, 0.5, n + 1)[:-1]  # (n,)
        return torch.from_numpy(ndtri(probabilities.numpy()))

    levels = torch.cat([-side(n_negative), torch.zeros(1, dtype=torch.float32), side(n_positive)]).sort().values
    return levels / levels.abs().max()


def evenly_spaced(start: float, end: float, n: int) -> torch.Tensor:
    """Return (n,) float32 from `start` to `end`, as torch.linspace does on CPUs that round step * i + start once.

    torch.linspace itself rounds twice on a CPU without AVX2, and numpy's version gives other last bits again, so their
    tables would differ between machines.
    """
    first, last = torch.tensor([start, end], dtype=torch.float32)
    step = (last - first) / (n - 1)
    i = torch.arange(n)
    # a product of two float32 is exact in float64, so .float() is the one rounding; each half is counted from its end
    return torch.where(i < n // 2, first + step.double() * i, last - step.double() * (n - 1 - i)).float()


def normal_offset(bits: int) -> float:
    """Return the outermost quantile of NF-`bits`: step 1 of the module docstring, to seven digits."""
    half_bins = 1 - 1 / (2 * (2**bits - 1)), 1 - 1 / (2 * 2**bits)
    return round(sum(half_bins) / 2, 7)  # with more digits, 12 of NF4's 16 float32 levels move by their last bit


def integer_levels(bits: int) -> torch.Tensor:
    """Return INT-k: two's complement integers over the largest positive one, (2^bits,) float32, ascending.

    The lowest level lies below -1, where no scaled weight falls, so 4 bits use only 15 levels.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits!r} is not supported: choose a whole number from 2 to 8")
    top = 2 ** (bits - 1) - 1  # 7 for 4 bits
    return torch.arange(-top - 1, top + 1, dtype=torch.float32) / top


def float_levels(exponent_bits: int, mantissa_bits: int) -> torch.Tensor:
    """Return a small float format over its largest value; the index is the bit pattern: sign, exponent, mantissa.

    Exponent 0 holds the subnormals, and no pattern is infinity or NaN (OCP microscaling formats, version 1.0).
    Returns (2^(1 + exponent_bits + mantissa_bits),) float32: the positive half, then its mirror, -0 included.
    """
    steps = 2**mantissa_bits  # values of one exponent
    # the exponent's bias drops out when everything is divided by the largest value
    subnormal = [m / steps for m in range(steps)]
    normal = [2.0**e * (1 + m / steps) for e in range(2**exponent_bits - 1) for m in range(steps)]
    return _mirror(torch.tensor(subnormal + normal, dtype=torch.float64))


def _mirror(half: torch.Tensor) -> torch.Tensor:
    half = half / half.max()  # in float64, then rounded once
    return torch.cat([half, -half]).float()  # the second half has the sign bit set; it starts with -0.0


_RECIPES = {
    "nf4": lambda: normal_float(4),
    "nf3": lambda: normal_float(3),
    "nf2": lambda: normal_float(2),
    "fp4": lambda: _mirror(torch.tensor(_FP4_TWELFTHS, dtype=torch.float64)),
    "e2m1": lambda: float_levels(2, 1),
    "e3m0": lambda: float_levels(3, 0),
    **{f"int{k}": (lambda k=k: integer_levels(k)) for k in range(2, 9)},
}
CODEBOOKS = tuple(_RECIPES)
CUSTOM = "custom"  # the name of a table that was made by hand, or fitted


def codebook(name: str) -> torch.Tensor:
    """Return the levels of a named data type: (2^bits,) float32; code i stands for entry i.

    Names: nf4, nf3, nf2 and int2 to int8 (ascending); fp4 (as bitsandbytes stores it), e2m1, e3m0 (by bit pattern).
    Raises ValueError for any other name. Returns a new tensor, which you may change.

    >>> codebook("nf4")[[0, 7, 15]].tolist()
    [-1.0, 0.0, 1.0]
    """
    if not isinstance(name, str) or name not in _RECIPES:
        raise ValueError(f"codebook {short(name)} is not known: choose one of {', '.join(CODEBOOKS)}")
    return _table(name).clone()


@lru_cache
def _table(name: str) -> torch.Tensor:
    return _RECIPES[name]()


def check_levels(levels: torch.Tensor) -> torch.Tensor:
    """Check that a table can serve as a codebook, and return a copy: (n,) float32.

    levels: 2 to 256 finite numbers in [-1, 1], each larger than the one before. They need not reach -1 or 1, nor
    include 0, though zero weights then become something else. Raises ValueError, which names the first level that is
    not allowed, and TypeError for anything but a table of numbers.
    """
    if not isinstance(levels, torch.Tensor) or levels.dim() != 1 or not levels.is_floating_point():
        kind = f"a tensor {tuple(levels.shape)} of {levels.dtype}" if isinstance(levels, torch.Tensor) else levels
        raise TypeError(f"levels are {kind!r}: give a name, such as 'nf4', or a float tensor of one dimension")
    if not 2 <= len(levels) <= 256:
        raise ValueError(f"{len(levels)} levels are given: a codebook has 2 to 256, as a code has at most 8 bits")
    table = levels.detach().float().cpu().clone()  # two levels that float32 cannot tell apart are one
    values = table.tolist()
    for i, value in enumerate(values):
        if not -1 <= value <= 1:  # false for NaN
            raise ValueError(f"level {i} is {value:g}: levels are finite and in [-1, 1], the range of scaled blocks")
        if i and value <= values[i - 1]:
            wrong = "is repeated" if value == values[i - 1] else f"comes after {values[i - 1]:g}"
            raise ValueError(f"level {i}, {value:g}, {wrong}: sort the levels in ascending order, each once")
    return table


def bits_of(levels: torch.Tensor) -> int:
    """Return how many bits an index into `levels` takes: 4 for 16 levels, and for the 15 of a symmetric table."""
    return (len(levels) - 1).bit_length()


def midpoints(levels: torch.Tensor) -> torch.Tensor:
    """Return where rounding passes from one level to the next: (n - 1,) float32, for ascending `levels`."""
    return (levels[:-1] + levels[1:]) / 2  # rounded to float32


def nearest_codes(scaled: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the code of the level nearest to each value; a tie goes to the lower level, as in bitsandbytes.

    scaled: any shape, float32. levels: (n,) float32 in code order, n <= 256. Returns uint8 of the shape of `scaled`.
    A NaN gets the code of zero. fp4 has two zeros: values in (0, first midpoint] get -0, all others that round to zero
    get +0, again as in bitsandbytes on the CPU (on CUDA it is the other way round; the values are equal).

    >>> nearest_codes(torch.tensor([-1.0, 0.0, 0.01, 0.9]), codebook("nf4")).tolist()
    [0, 7, 7, 15]
    """
    thresholds, order = rounding(levels)
    return order[torch.bucketize(scaled.nan_to_num(nan=0.0), thresholds, out_int32=True)]


def rounding(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what rounding to `levels` needs: thresholds (n - 1,) float32 ascending, and order (n,) uint8.

    The code of a value is order[number of thresholds below it]. order is 0, 1, 2 ... for nf4; for fp4 it leads back to
    bit patterns.

    >>> rounding(torch.tensor([0.0, 1.0, -1.0]))
    (tensor([-0.5000,  0.5000]), tensor([2, 0, 1], dtype=torch.uint8))
    """
    order = torch.argsort(levels, stable=True)  # stable: of two equal levels, -0 and +0, the first comes first
    return midpoints(levels[order]), order.to(torch.uint8)  # (n - 1,), (n,)


def zero_code(levels: torch.Tensor) -> int:
    """Return the code of 0, used as padding."""
    return int(nearest_codes(torch.zeros(1, dtype=torch.float32), levels.cpu()))
