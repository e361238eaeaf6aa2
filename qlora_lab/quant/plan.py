"""Which data type and block size for which layer: the mix of least damage under a budget of bits, exactly.

In: Choices, two tables of (layers, candidates): the expected damage of each, and its bits, constants included.
Out: a Plan, one candidate a layer, which load, quantize_linears and quantize_folder take, and which is a JSON file.

The problem is a multiple-choice knapsack: x is 1 for the chosen candidate of a layer and 0 for all others,
    minimise  sum error x   with   sum over candidates of x = 1 for each layer   and   sum bits x <= budget,
solved by branch and bound to optimality (HiGHS, through scipy.optimize.milp).
QLoRA itself has one block size for a whole model (section 3); that it tunes them layer by layer is often said and is in
no release of it. What that would gain, notebook 03 measures.

Not here: where the errors come from (measure/sensitivity.py).
"""

import ctypes
import json
import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qlora_lab.files.out_path import out_path
from qlora_lab.files.replace import replace_text
from qlora_lab.files.strict_json import NUMBER, OBJECT, SWITCH, TEXT, check_keys, each, read_json, whole
from qlora_lab.quant.blocks import check_block_size
from qlora_lab.quant.codebook import bits_of, codebook as named_codebook
from qlora_lab.quant.double_quant import GROUP_SIZE
from qlora_lab.quant.numbers import check_number
from qlora_lab.quant.packing import group_of

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

ABSMAX_BITS, ABSMAX_CODE_BITS = 32, 8  # of a constant: float32, or its code (double_quant.py)
TINY = 1e-300  # no division by zero
PRECISE = 1e-9  # of the largest error: a relaxed optimum below that would scale the others past what HiGHS takes
ONE_HUSH = threading.Lock()  # of two at once the second would take the first one's silence for the normal state
INFEASIBLE = 2  # scipy.optimize.milp's status where no choice keeps the limits


class Candidate(NamedTuple):
    """What a layer can be quantised as: the options of quantize."""

    codebook: str
    block_size: int
    double_quant: bool


DEFAULT = Candidate("nf4", 64, True)  # of load, quantize_linears and quantize_folder: the paper's


@dataclass(frozen=True)
class Choices:
    """What each layer can become, and what that costs.

    layers: paths of the linear layers. numel: their weights. candidates: the same for all layers.
    error, bits: (layers, candidates) float64; error is the expected damage, in whatever unit makes a sum of layers
    meaningful; bits are those of codes and constants (stored_bits). model: what they are of, for plans to say.
    """

    layers: tuple[str, ...]
    numel: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    error: np.ndarray
    bits: np.ndarray
    model: str = "model"

    def __post_init__(self):
        shape = len(self.layers), len(self.candidates)
        if not all(shape):
            raise ValueError(f"{shape[0]} layers x {shape[1]} candidates: there is nothing to choose from")
        if len(self.numel) != len(self.layers):
            raise ValueError(f"numel has {len(self.numel)} entries for {len(self.layers)} layers: one each is needed")
        for name, table in (("error", self.error), ("bits", self.bits)):
            if table.shape != shape:
                raise ValueError(
                    f"{name} has shape {table.shape}: {shape[0]} layers x {shape[1]} candidates need a row each"
                )
        if not np.isfinite(self.error).all():
            layer = self.layers[int(np.argwhere(~np.isfinite(self.error))[0][0])]
            raise ValueError(
                f"the error of {layer} is not finite: look for NaN or infinity in its weight or its inputs"
            )


@dataclass(frozen=True)
class Plan:
    """One candidate for each linear layer of `model`.

    error: sum of the chosen errors. bits_per_parameter: of the quantised layers, constants included. numel: weights of
    each layer, by which a plan for a model of another shape is told.
    """

    model: str
    chosen: dict[str, Candidate]
    error: float
    bits_per_parameter: float
    numel: dict[str, int]

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON and return its path, which never holds half a plan, not even after a power cut.

        Another plan there is replaced. Raises as check_plan_path does; waits while another process writes one there.
        """
        path = check_plan_path(path)
        layers = {name: one._asdict() | {"numel": self.numel[name]} for name, one in self.chosen.items()}
        lines = [f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in layers.items()]  # a line a layer
        head = {"model": self.model, "error": self.error, "bits_per_parameter": self.bits_per_parameter}
        body = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
        replace_text(path, f'{{\n{body},\n "layers": {{\n' + ",\n".join(lines) + "\n }\n}\n")
        return path

    def check(self, numel: dict[str, int]) -> None:
        """Raise ValueError for the first layer in which this plan and a model differ. numel: layer -> its weights."""
        for name, weights in numel.items():
            if name not in self.chosen:
                raise ValueError(f"the plan, for {self.model}, has no {name}, which the model has: {_REMEDY}")
            if self.numel[name] != weights:
                given = f"{name} of {self.numel[name]:,} weights, but the model's has {weights:,}"
                raise ValueError(f"the plan is for {self.model} with {given}: {_REMEDY}")
        for name in self.chosen:
            if name not in numel:
                raise ValueError(f"the plan, for {self.model}, has {name}, which is no linear layer here: {_REMEDY}")


_REMEDY = "make a plan for this model"


def of_layers(options: Candidate, plan: Plan | None, numel: dict[str, int]) -> dict[str, Candidate]:
    """What each layer is quantised as: by `plan` where there is one, else all by `options`.

    numel: layer -> its weights. Raises ValueError for a plan that is another model's, or beside options of one's own.
    """
    if plan is None:
        return dict.fromkeys(numel, options)
    if options != DEFAULT:
        raise ValueError(f"a plan decides codebook, block size and double quantization: leave out {tuple(options)}")
    plan.check(numel)
    return plan.chosen


def as_plan(plan: Plan | str | Path | None) -> Plan | None:
    """The plan, read where its file is given."""
    return plan if plan is None or isinstance(plan, Plan) else load_plan(plan)


def check_plan_path(path: str | Path) -> Path:
    """The path, if a plan may be written to it.

    Raises FileExistsError for what is there and is no plan, and ValueError for an empty path.
    """
    path = out_path(path)
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is no file: name one for the plan")
    if path.exists():
        try:
            load_plan(path)
        except ValueError as error:
            raise FileExistsError(
                f"{path} is there and is not replaced, as it is no plan: name another file"
            ) from error
    return path


def load_plan(path: str | Path) -> Plan:
    """Read a plan. Raises ValueError for a file that is none, with what is wrong in it."""
    path = Path(path)
    try:
        found = read_json(path, _PLAN_RULES, _PLAN_RULES)
        layers = found["layers"]
        for name, layer in layers.items():
            check_keys(layer, _LAYER_RULES, name, _LAYER_RULES)
    except ValueError as error:
        reason = str(error).removeprefix(str(path)).lstrip(", ")
        raise ValueError(f"{path} is not a plan, or is cut off ({reason})") from None
    chosen = {name: Candidate(*(layer[key] for key in Candidate._fields)) for name, layer in layers.items()}
    for name, candidate in chosen.items():
        if unknown := sorted(layers[name].keys() - _LAYER_RULES.keys()):
            raise ValueError(f"{path}: {name} has {unknown[0]!r}, which is not known here: {_REMEDY}")
        try:
            check_candidate(candidate)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    numel = {name: layer["numel"] for name, layer in layers.items()}
    return Plan(found["model"], chosen, float(found["error"]), float(found["bits_per_parameter"]), numel)


_PLAN_RULES = {"model": TEXT, "error": NUMBER, "bits_per_parameter": NUMBER, "layers": each(OBJECT)}
_LAYER_RULES = {"codebook": TEXT, "block_size": whole(1), "double_quant": SWITCH, "numel": whole(1)}


def check_candidate(candidate: Candidate) -> None:
    """Raise what quantize raises for such options, and TypeError for a double_quant that is no bool."""
    named_codebook(candidate.codebook)
    check_block_size(candidate.block_size)
    if not isinstance(candidate.double_quant, bool):  # "no" would count as true
        raise TypeError(f"double_quant={candidate.double_quant!r} must be True or False")


def stored_bits(numel: int, candidate: Candidate) -> int:
    """Bits of a quantised tensor of `numel` weights: packed codes and constants, as QuantizedTensor.nbytes has them.

    >>> stored_bits(6400, Candidate("nf4", 64, False)) / 6400
    4.5
    """
    n_codes, n_bytes = group_of(bits_of(named_codebook(candidate.codebook)))
    return -(-numel // n_codes) * n_bytes * 8 + constant_bits(numel, candidate)


def bits_table(numel: Iterable[int], candidates: Sequence[Candidate]) -> np.ndarray:
    """stored_bits of each layer as each candidate: (layers, candidates) float64."""
    return np.array([[stored_bits(n, one) for one in candidates] for n in numel], dtype=float)


def constant_bits(numel: int, candidate: Candidate) -> int:
    """The constants' part of stored_bits: a float32 a block; or a code a block, a float32 a group, and one offset."""
    n_blocks = -(-numel // candidate.block_size)
    if not candidate.double_quant:
        return ABSMAX_BITS * n_blocks
    return ABSMAX_CODE_BITS * n_blocks + ABSMAX_BITS * (-(-n_blocks // GROUP_SIZE) + 1)


# -------------------------------------------------------------------------------------------------------------- choose


def best_plan(
    choices: Choices,
    bits_per_parameter: float = math.inf,
    *,
    constants_share: float | None = None,
    groups: Sequence[Sequence[str]] = (),
) -> Plan:
    """The plan of least error with at most `bits_per_parameter` on average over all weights.

    constants_share: constants take at most this share of the bits of the codes, over the whole model: 0.05 for the
    rule of thumb of 5 %. groups: layers that must share one choice, such as small ones that are stored together
    (small_layers finds them). The optimum is exact; which of several equal ones is taken is not said.
    Raises ValueError for a budget below the smallest plan's, which it names, for limits that are none, and for groups
    that overlap or name a layer that there is not.
    """
    check_limits(bits_per_parameter, constants_share)
    members = _members(choices, groups)
    bits = np.stack([choices.bits[rows].sum(0) for rows in members])  # (groups, candidates)
    constants = _constants(choices, members)
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
    """Raise ValueError unless best_plan can take these two."""
    if bits_per_parameter != math.inf:
        check_number("bits_per_parameter", bits_per_parameter, lambda bits: bits > 0, "a number above 0, such as 4.5")
    if constants_share is not None:
        what = "above 0 and at most 1, such as 0.05"
        check_number("constants_share", constants_share, lambda share: 0 < share <= 1, what)


def uniform(choices: Choices, candidate: Candidate) -> Plan:
    """The plan that gives every layer the same candidate. Raises ValueError for one that is not among the choices."""
    if candidate not in choices.candidates:
        raise ValueError(f"{candidate} is no candidate: choose from {', '.join(map(str, choices.candidates))}")
    return _plan(choices, [choices.candidates.index(candidate)] * len(choices.layers))


def small_layers(choices: Choices, fewer_than: int) -> tuple[tuple[str, ...], ...]:
    """Groups for best_plan: layers of fewer than `fewer_than` weights that belong to one module, such as k_proj and
    v_proj of one attention."""
    found: dict[str, list[str]] = {}
    for name, weights in zip(choices.layers, choices.numel, strict=True):
        if weights < fewer_than:
            found.setdefault(name.rpartition(".")[0], []).append(name)
    return tuple(tuple(names) for names in found.values() if len(names) > 1)


def _members(choices: Choices, groups: Sequence[Sequence[str]]) -> list[list[int]]:
    """Rows of the layers that share a choice; a layer of no group is one of its own."""
    row = {name: number for number, name in enumerate(choices.layers)}
    members, taken = [], set()
    for group in groups:
        for name in group:
            if name not in row:
                raise ValueError(f"a group names {name!r}, which is no layer here: a group is a list of layers' paths")
            if name in taken:
                raise ValueError(f"{name} is in two groups: a layer takes one choice only")
            taken.add(name)
        members.append([row[name] for name in group])
    return [rows for rows in members if rows] + [[number] for name, number in row.items() if name not in taken]


def _solve(error: np.ndarray, limits: list[tuple[np.ndarray, float]]) -> list[int] | None:
    """The candidate of each row of `error`, (rows, candidates), of least sum; None if no choice keeps the limits.

    limits: (cost, the most that the sum of its chosen entries may be), in bits.
    """
    extra = error - error.min(1, keepdims=True)  # what a row has at least anyway changes no choice
    relaxed = _milp(extra / max(extra.max(), TINY), limits, whole=False)
    if relaxed.x is None:
        assert relaxed.status == INFEASIBLE, relaxed.message
        return None
    # The solver stops at a gap of 1e-6, absolute: in units of a thousandth of the relaxed optimum that is nothing,
    # in units of the largest error, that of two bits on the most sensitive layer, it was 0.02 % of the sum.
    unit = max(relaxed.fun, PRECISE) * max(extra.max(), TINY) / 1000  # a relaxed optimum can be 0, the true one not
    found = _milp(extra / unit, limits, whole=True)
    if found.x is None:
        assert found.status == INFEASIBLE, found.message
        return None
    picked = found.x.reshape(error.shape).argmax(1)  # (rows,)
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
    """Nothing from C on standard output: scipy 1.17's HiGHS prints a line there for each solution that it mends."""
    if os.name == "nt" or sys.stdout is None:  # the one has no libc under this name, the other no standard output
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
            libc.fflush(None)  # what C still holds back goes nowhere as well
            os.dup2(kept, 1)
            os.close(kept)


def _picked(table: np.ndarray, chosen: Sequence[int]) -> float:
    """Sum of one entry a row."""
    return float(table[np.arange(len(table)), chosen].sum())


def _constants(choices: Choices, members: list[list[int]]) -> np.ndarray:
    """Bits of constants, (groups, candidates)."""
    table = [[constant_bits(weights, one) for one in choices.candidates] for weights in choices.numel]
    return np.stack([np.array(table, float)[rows].sum(0) for rows in members])


def _too_small(bits: np.ndarray, constants: np.ndarray, weights: int, asked: float, share: float | None) -> str:
    """Why there is no plan, with the smallest limit for which there is one. Tables: (groups, candidates)."""
    fewest = bits.argmin(1) if share is None else _solve(bits, [_share_limit(bits, constants, share)])
    if fewest is None:
        least, chosen = math.inf, constants.argmin(1)
        # the least quotient of two sums, by Dinkelbach's iteration: a handful of steps
        while (lower := _picked(constants, chosen) / _picked(bits - constants, chosen)) < least:
            least, chosen = lower, (constants - lower * (bits - constants)).argmin(1)
        return f"constants_share={share:g} is too small: constants take at least {_up(least)} of the codes"
    smallest = _picked(bits, fewest) / weights
    return f"a budget of {asked:g} bits per parameter is too small: the smallest plan takes {_up(smallest)}"


def _share_limit(bits: np.ndarray, constants: np.ndarray, share: float) -> tuple[np.ndarray, float]:
    return constants - share * (bits - constants), 0.0


def _up(value: float) -> str:
    return f"{math.ceil(value * 1e4) / 1e4:.4f}"  # up, so that what is shown can be asked for


def _plan(choices: Choices, picked: list[int]) -> Plan:
    rows = range(len(choices.layers))
    chosen = {name: choices.candidates[c] for name, c in zip(choices.layers, picked, strict=True)}
    bits = choices.bits[rows, picked].sum() / sum(choices.numel)
    numel = dict(zip(choices.layers, choices.numel, strict=True))
    return Plan(choices.model, chosen, float(choices.error[rows, picked].sum()), float(bits), numel)
