"""Which data type and block size for which layer: the mix that does the least damage within a budget of bits.

The problem is a multiple-choice knapsack: x is 1 for the chosen candidate of a layer and 0 for all others,
    minimise  sum error x   with   sum over candidates of x = 1 for each layer   and   sum bits x <= budget,
solved by branch and bound to optimality (HiGHS, through scipy.optimize.milp).
QLoRA itself uses one block size for a whole model (section 3). It is often said to tune them layer by layer, but none
of its releases does. Notebook 03 measures what that would gain.

Not here: where the errors come from (measure/sensitivity.py), what a plan is and its file (quant/plan.py).
"""

import ctypes
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qlora_lab.quant.codebook import bits_of, codebook as named_codebook
from qlora_lab.quant.double_quant import GROUP_SIZE
from qlora_lab.quant.numbers import check_number
from qlora_lab.quant.packing import group_of
from qlora_lab.quant.plan import Candidate, Plan

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

ABSMAX_BITS, ABSMAX_CODE_BITS = 32, 8  # of a constant: float32, or its code (double_quant.py)
SMALLEST_UNIT = 1e-300  # errors are divided by a unit, which must not be 0
PRECISE = 1e-9  # of the largest error: a relaxed optimum below that would scale the others past what HiGHS takes
ONE_HUSH = threading.Lock()  # two at once: the second would take the silence of the first for the normal state
INFEASIBLE = 2  # scipy.optimize.milp's status where no choice keeps the limits


@dataclass(frozen=True)
class Choices:
    """What each layer can become, and what that costs.

    layers: paths of linear layers and stacks of experts. numel: their weights. candidates: the same for all layers.
    error, bits: (layers, candidates) float64. The error is the expected damage, in a unit that may be summed over
    layers; the bits are those of codes and constants (stored_bits). model: its name, which the plan records.
    matrices: of each layer, the number of experts in a stack; without them, 1.
    """

    layers: tuple[str, ...]
    numel: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    error: np.ndarray
    bits: np.ndarray
    model: str = "model"
    matrices: tuple[int, ...] = ()

    def __post_init__(self):
        shape = len(self.layers), len(self.candidates)
        if not all(shape):
            raise ValueError(
                f"{shape[0]} layers x {shape[1]} candidates leave nothing to choose from: give some of each"
            )
        if not self.matrices:
            object.__setattr__(self, "matrices", (1,) * len(self.layers))
        for name, entries in (("numel", self.numel), ("matrices", self.matrices)):
            if len(entries) != len(self.layers):
                raise ValueError(f"{name} has {len(entries)} entries for {len(self.layers)} layers: give one each")
        for name, table in (("error", self.error), ("bits", self.bits)):
            if table.shape != shape:
                raise ValueError(f"{name} has shape {table.shape}: give {shape[0]} layers x {shape[1]} candidates")
        if not np.isfinite(self.error).all():
            layer = self.layers[int(np.argwhere(~np.isfinite(self.error))[0][0])]
            raise ValueError(f"the error of {layer} is not finite: look for NaN or infinity in its weight and inputs")


def stored_bits(numel: int, candidate: Candidate) -> int:
    """Count the bits of a quantised tensor of `numel` weights, codes and constants, as QuantizedTensor.nbytes does."""
    n_codes, n_bytes = group_of(bits_of(named_codebook(candidate.codebook)))
    return -(-numel // n_codes) * n_bytes * 8 + constant_bits(numel, candidate)


def unmeasured(shapes: Mapping[str, Sequence[int]], candidates: tuple[Candidate, ...]) -> Choices:
    """Return choices with bits, and the bits as errors: whether a plan exists does not depend on errors.

    shapes: path -> (out_features, in_features), or (experts, out_features, in_features).
    """
    numel = tuple(map(math.prod, shapes.values()))
    matrices = tuple(math.prod(shape[:-2]) for shape in shapes.values())
    bits = _table(numel, matrices, candidates, stored_bits)
    return Choices(tuple(shapes), numel, candidates, bits, bits, matrices=matrices)


def _table(
    numel: Iterable[int],
    matrices: Iterable[int],
    candidates: Sequence[Candidate],
    bits: Callable[[int, Candidate], int],
) -> np.ndarray:
    """Return `bits` of each layer as each candidate: (layers, candidates) float64. Each expert begins new blocks."""
    pairs = zip(numel, matrices, strict=True)
    return np.array([[m * bits(n // m, candidate) for candidate in candidates] for n, m in pairs], dtype=float)


def constant_bits(numel: int, candidate: Candidate) -> int:
    """Count the constants' part of stored_bits: a float32 per block, or a code per block plus scales and an offset."""
    n_blocks = -(-numel // candidate.block_size)
    if not candidate.double_quant:
        return ABSMAX_BITS * n_blocks
    n_scales = -(-n_blocks // GROUP_SIZE)
    return ABSMAX_CODE_BITS * n_blocks + ABSMAX_BITS * (n_scales + 1)


# -------------------------------------------------------------------------------------------------------------- choose


def best_plan(
    choices: Choices,
    bits_per_parameter: float = math.inf,
    *,
    constants_share: float | None = None,
    groups: Sequence[Sequence[str]] = (),
) -> Plan:
    """Find the plan of least error with at most `bits_per_parameter` on average over all weights.

    constants_share: over the whole model, constants take at most this share of the bits of the codes; 0.05 is the
    rule of thumb of 5 %. groups: layers that must share one choice, such as small ones that are stored together
    (small_layers finds them). The optimum is exact; among several equal ones any may be taken.
    Raises ValueError for a budget below that of the smallest plan, which it names, for limits out of range, and for
    groups that overlap or name an unknown layer.
    """
    check_limits(bits_per_parameter, constants_share)
    members = _members(choices, groups)
    bits = np.stack([choices.bits[rows].sum(0) for rows in members])  # (groups, candidates)
    constants = _constants(choices, members)  # (groups, candidates)
    weights = sum(choices.numel)
    limits = [] if constants_share is None else [_share_limit(bits, constants, constants_share)]
    if math.isfinite(bits_per_parameter):
        # a budget that is computed as bits / weights may have lost its last digit
        limits.append((bits, math.floor(bits_per_parameter * weights * (1 + 1e-15))))
    picked = _solve(np.stack([choices.error[rows].sum(0) for rows in members]), limits)
    if picked is None:
        raise ValueError(_too_small(bits, constants, weights, bits_per_parameter, constants_share))
    of_layer = {row: candidate for rows, candidate in zip(members, picked, strict=True) for row in rows}
    return _plan(choices, [of_layer[row] for row in range(len(choices.layers))])


def check_limits(bits_per_parameter: float, constants_share: float | None = None) -> None:
    """Raise ValueError unless best_plan accepts both limits."""
    if bits_per_parameter != math.inf:
        check_number("bits_per_parameter", bits_per_parameter, lambda bits: bits > 0, "a number above 0, such as 4.5")
    if constants_share is not None:
        what = "above 0 and at most 1, such as 0.05"
        check_number("constants_share", constants_share, lambda share: 0 < share <= 1, what)


def uniform(choices: Choices, candidate: Candidate) -> Plan:
    """Plan the same candidate for every layer. Raises ValueError for one that is not among the choices."""
    if candidate not in choices.candidates:
        raise ValueError(f"{candidate} is not a candidate: choose from {', '.join(map(str, choices.candidates))}")
    return _plan(choices, [choices.candidates.index(candidate)] * len(choices.layers))


def small_layers(choices: Choices, fewer_than: int) -> tuple[tuple[str, ...], ...]:
    """Group layers of fewer than `fewer_than` weights by module, such as k_proj and v_proj of one attention."""
    by_module: dict[str, list[str]] = {}
    for name, weights in zip(choices.layers, choices.numel, strict=True):
        if weights < fewer_than:
            by_module.setdefault(name.rpartition(".")[0], []).append(name)
    return tuple(tuple(names) for names in by_module.values() if len(names) > 1)


def _members(choices: Choices, groups: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return the rows of the layers that share a choice; a layer outside all groups is a group of its own."""
    row = {name: number for number, name in enumerate(choices.layers)}
    members = []
    taken = set()
    for group in groups:
        for name in group:
            if name not in row:
                raise ValueError(f"a group names {name!r}, which is not a layer: give groups as lists of layers' paths")
            if name in taken:
                raise ValueError(f"{name} is in two groups: leave it in one")
            taken.add(name)
        members.append([row[name] for name in group])
    return [rows for rows in members if rows] + [[number] for name, number in row.items() if name not in taken]


def _solve(error: np.ndarray, limits: list[tuple[np.ndarray, float]]) -> list[int] | None:
    """Choose a candidate for each row of `error`, (rows, candidates), with the least sum; None if no choice fits.

    limits: pairs of a cost table in bits, (rows, candidates), and the most that its chosen entries may add up to.
    """
    extra = error - error.min(1, keepdims=True)  # a row's smallest error is paid in any case: it changes no choice
    relaxed = _milp(extra / max(extra.max(), SMALLEST_UNIT), limits, whole=False)
    if relaxed.x is None:
        assert relaxed.status == INFEASIBLE, relaxed.message
        return None
    # The solver stops at an absolute gap of 1e-6. In units of a thousandth of the relaxed optimum that is nothing; in
    # units of the largest error, that of two bits on the most sensitive layer, it was 0.02 % of the sum.
    unit = max(relaxed.fun, PRECISE) * max(extra.max(), SMALLEST_UNIT) / 1000  # a relaxed optimum can be 0
    solution = _milp(extra / unit, limits, whole=True)
    if solution.x is None:
        assert solution.status == INFEASIBLE, solution.message
        return None
    picked = solution.x.reshape(error.shape).argmax(1)  # (rows,)
    for cost, most in limits:
        assert _picked(cost, picked) <= most + 1, (_picked(cost, picked), most)
    return picked.tolist()


def _milp(error: np.ndarray, limits: list[tuple[np.ndarray, float]], whole: bool) -> "OptimizeResult":
    from scipy.optimize import Bounds, LinearConstraint, milp  # here, because it takes a quarter of a second to import
    from scipy.sparse import coo_array

    rows, n = len(error), error.size
    one_each = coo_array((np.ones(n), (np.repeat(np.arange(rows), n // rows), np.arange(n))), shape=(rows, n))
    costs = [LinearConstraint(cost.reshape(1, n) / 8, ub=most / 8) for cost, most in limits]  # bytes: whole numbers
    with _hushed():
        return milp(
            error.reshape(n),
            integrality=np.full(n, int(whole)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), *costs],
            options={"mip_rel_gap": 0},  # its default stops within 0.01 %
        )


@contextmanager
def _hushed() -> Iterator[None]:
    """Silence C's standard output: HiGHS in scipy 1.17 prints a line there for each solution that it repairs."""
    if os.name == "nt" or sys.stdout is None:  # no libc under this name, or no standard output
        yield
        return
    libc = ctypes.CDLL(None)
    with ONE_HUSH:
        sys.stdout.flush()
        libc.fflush(None)
        kept = os.dup(1)
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            libc.fflush(None)  # what C has buffered is dropped as well
            os.dup2(kept, 1)
            os.close(kept)


def _picked(table: np.ndarray, chosen: Sequence[int]) -> float:
    """Sum one entry of each row."""
    return float(table[np.arange(len(table)), chosen].sum())


def _constants(choices: Choices, members: list[list[int]]) -> np.ndarray:
    """Return the bits of constants, (groups, candidates)."""
    table = _table(choices.numel, choices.matrices, choices.candidates, constant_bits)
    return np.stack([table[rows].sum(0) for rows in members])


def _too_small(bits: np.ndarray, constants: np.ndarray, weights: int, asked: float, share: float | None) -> str:
    """Say why no plan exists, with the smallest limit that allows one. Tables: (groups, candidates)."""
    fewest = bits.argmin(1) if share is None else _solve(bits, [_share_limit(bits, constants, share)])
    if fewest is None:
        least = math.inf
        chosen = constants.argmin(1)
        # Dinkelbach's iteration finds the least quotient of two sums in a handful of steps
        while (lower := _picked(constants, chosen) / _picked(bits - constants, chosen)) < least:
            least = lower
            chosen = (constants - lower * (bits - constants)).argmin(1)
        return f"constants_share={share:g} is too small: constants take at least {_up(least)} of the codes"
    smallest = _picked(bits, fewest) / weights
    return f"a budget of {asked:g} bits per parameter is too small: the smallest plan takes {_up(smallest)}"


def _share_limit(bits: np.ndarray, constants: np.ndarray, share: float) -> tuple[np.ndarray, float]:
    return constants - share * (bits - constants), 0.0


def _up(value: float) -> str:
    return f"{math.ceil(value * 1e4) / 1e4:.4f}"  # rounded up, so that the value shown is allowed


def _plan(choices: Choices, picked: list[int]) -> Plan:
    rows = range(len(choices.layers))
    chosen = {name: choices.candidates[c] for name, c in zip(choices.layers, picked, strict=True)}
    bits = choices.bits[rows, picked].sum() / sum(choices.numel)
    numel = dict(zip(choices.layers, choices.numel, strict=True))
    return Plan(choices.model, chosen, float(choices.error[rows, picked].sum()), float(bits), numel)
