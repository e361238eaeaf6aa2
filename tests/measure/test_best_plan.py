"""The best mix of block sizes is the best of all mixes and keeps every limit."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import scipy.optimize
import torch

from qlora_lab.measure.best_plan import (
    Candidate,
    Choices,
    best_plan,
    constant_bits,
    small_layers,
    stored_bits,
    uniform,
)
from qlora_lab.quant.quantize import quantize

CANDIDATES = tuple(Candidate(name, size, False) for name in ("nf4", "nf3") for size in (32, 128, 512))
NUMEL = (4096, 1024, 1024, 6000)


def random_choices(seed=0, numel=NUMEL, candidates=CANDIDATES):
    """Layers of one block of a LLaMA, errors drawn over two decades: more bits do not always mean less error."""
    draws = np.random.default_rng(seed)
    error = 10 ** draws.uniform(-1, 1, (len(numel), len(candidates)))
    bits = np.array([[stored_bits(n, one) for one in candidates] for n in numel], dtype=float)
    return Choices(tuple(f"block.{i}" for i in range(len(numel))), numel, candidates, error, bits, "drawn")


def brute_force(choices, budget, share=None, together=()):
    """The least error of every mix that keeps the limits."""
    rows, least = range(len(choices.layers)), np.inf
    for picked in product(range(len(choices.candidates)), repeat=len(choices.layers)):
        bits = sum(choices.bits[row, picked[row]] for row in rows)
        constants = sum(constant_bits(choices.numel[row], choices.candidates[picked[row]]) for row in rows)
        if bits > budget * sum(choices.numel) or len({picked[row] for row in together}) > 1:
            continue
        if share is None or constants <= share * (bits - constants):
            least = min(least, sum(choices.error[row, picked[row]] for row in rows))
    return least


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("budget", "share", "together"), [(3.4, None, ()), (4.2, None, (1, 2)), (4.2, 0.05, ()), (9.0, 0.03, (0, 3))]
)
def test_the_optimum_is_that_of_brute_force(seed, budget, share, together):
    choices = random_choices(seed)
    groups = [[choices.layers[row] for row in together]]
    plan = best_plan(choices, budget, constants_share=share, groups=groups)
    assert plan.error == pytest.approx(brute_force(choices, budget, share, together), rel=1e-9)
    assert plan.bits_per_parameter <= budget
    assert len({plan.chosen[name] for name in groups[0]}) <= 1


@pytest.mark.parametrize("codebook", ["nf4", "nf3", "int8", "int5"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("numel", "size"), [(64 * 300, 64), (1001, 32), (17, 1024)])
def test_bits_are_those_that_quantize_stores(codebook, double_quant, numel, size):
    q = quantize(torch.linspace(-1, 1, numel), codebook, size, double_quant)
    assert stored_bits(numel, Candidate(codebook, size, double_quant)) == 8 * q.nbytes
    assert constant_bits(numel, Candidate(codebook, size, double_quant)) == 8 * q.constants.nbytes


def test_a_uniform_plan_fits_its_own_bits_and_is_never_better():
    choices = random_choices()
    for one in choices.candidates:
        same = uniform(choices, one)
        best = best_plan(choices, same.bits_per_parameter)
        assert set(same.chosen.values()) == {one}
        assert best.bits_per_parameter <= same.bits_per_parameter and best.error <= same.error
    only = Choices(choices.layers, NUMEL, (one,), choices.error[:, -1:], choices.bits[:, -1:])
    with pytest.raises(ValueError, match="too small"):
        best_plan(only, same.bits_per_parameter - 1e-6)  # less than a bit too little is too little


def test_more_bits_never_cost_error():
    choices = random_choices(1)
    plans = [best_plan(choices, budget) for budget in (3.1, 3.5, 4.0, 4.5, 5.0)]
    errors = [plan.error for plan in plans]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]
    assert plans[2] == best_plan(choices, 4.0)
    assert best_plan(choices).error == pytest.approx(choices.error.min(1).sum())  # no limit at all


def test_errors_of_very_different_size_are_told_apart():
    """Two bits cost 10^6 times what four do. The solver stops at 10^-6 of its unit: were that the largest error, the
    sum would end 3 % above the optimum, which is here found by a table of the least error for each number of bytes.
    """
    draws = np.random.default_rng(9)
    candidates = [Candidate("nf4", 2**k, False) for k in range(5, 11)] + [Candidate("nf2", 64, True)]
    sensitivities, noise = 10 ** draws.uniform(-1, 1, (20, 1)), draws.uniform(0.95, 1.05, (20, 7))
    error = sensitivities * [1, 1.1, 1.2, 1.3, 1.4, 1.5, 1e6] * noise
    bits = np.array([[stored_bits(4096, one) for one in candidates]] * 20, dtype=float)
    choices = Choices(tuple(map(str, range(20))), (4096,) * 20, tuple(candidates), error, bits)
    least = np.zeros(20 * 4096 * 9 // 16 + 1)  # [bytes]: 4.5 bits a weight at most
    for errors, nbytes in zip(error, (bits // 8).astype(int), strict=True):
        ways = [np.pad(least + e, (n, 0), constant_values=np.inf) for e, n in zip(errors, nbytes, strict=True)]
        least = np.min([way[: len(least)] for way in ways], axis=0)
    assert best_plan(choices, 4.5).error == pytest.approx(least[-1], rel=1e-12)


def test_a_relaxed_optimum_of_zero_can_be_out_of_reach():
    """Parts of "a"'s last and "b"'s first keep both limits at error 0; of whole ones only "b"'s second does, for 1."""
    candidates = tuple(
        Candidate(name, size, size > 32) for name, sizes in (("nf3", (32, 1024)), ("int5", (32, 64))) for size in sizes
    )
    numel, error = (5784, 7097), np.array([[166.0, 0, 0, 0], [0, 1, 0, 0]])
    bits = np.array([[stored_bits(n, one) for one in candidates] for n in numel], dtype=float)
    choices, budget = Choices(("a", "b"), numel, candidates, error, bits), (17464 + 21432 + 9212) / sum(numel)
    assert brute_force(choices, budget, 0.13) == 1 == best_plan(choices, budget, constants_share=0.13).error


def test_a_uniform_plan_of_a_large_model_fits_its_own_bits():
    """7e11 weights, as they are in 405B and more: bits / weights * weights may end below bits."""
    candidate = Candidate("nf4", 48, True)
    numel = (53248 * 16384 - 3,) * 800
    bits = np.full((800, 1), float(stored_bits(numel[0], candidate)))
    choices = Choices(tuple(map(str, range(800))), numel, (candidate,), bits, bits)
    same = uniform(choices, candidate)
    assert best_plan(choices, same.bits_per_parameter) == same


@pytest.mark.long
def test_solvers_in_threads_leave_standard_output_as_it_was(capfd):
    choices = random_choices()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: best_plan(choices, 4.0), range(20)))
    os.write(1, b"after")
    assert capfd.readouterr().out == "after"


def test_what_the_solver_prints_from_c_stays_off_standard_output(capfd, monkeypatch):
    """On large models HiGHS does, and the command line's --json would be none."""
    solve = scipy.optimize.milp
    monkeypatch.setattr(scipy.optimize, "milp", lambda *a, **k: ctypes.CDLL(None).puts(b"from C") and solve(*a, **k))
    best_plan(random_choices(), 4.0)
    print("after")
    assert capfd.readouterr() == ("after\n", "")


def test_small_layers_of_one_module():
    names = ("0.attn.q", "0.attn.k", "0.attn.v", "0.mlp.up", "1.attn.k", "1.attn.v")
    numel = (100, 10, 10, 10, 10, 10)
    bits = np.ones((6, 1))
    choices = Choices(names, numel, CANDIDATES[:1], bits, bits)
    assert small_layers(choices, 50) == (("0.attn.k", "0.attn.v"), ("1.attn.k", "1.attn.v"))
    assert small_layers(choices, 10) == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits_per_parameter": 3.0}, r"budget of 3 bits per parameter is too small: the smallest plan takes 3\.06"),
        ({"constants_share": 0.001}, r"constants_share=0.001 is too small: constants take at least 0\.01"),
        ({"bits_per_parameter": 3.0, "constants_share": 0.05}, r"budget of 3 bits per parameter is too small"),
        ({"bits_per_parameter": np.nan}, "bits_per_parameter=nan is not allowed: it is a number above 0, such as 4.5"),
        ({"bits_per_parameter": -np.inf}, "bits_per_parameter=-inf is not allowed"),
        ({"constants_share": np.nan}, "constants_share=nan is not allowed: it is above 0 and at most 1"),
        ({"constants_share": np.inf}, "constants_share=inf is not allowed"),
        ({"groups": [["block.0", "nosuch"]]}, "a group names 'nosuch', which is not a layer: give groups as lists"),
        ({"groups": [["block.0", "block.1"], ["block.1"]]}, r"block\.1 is in two groups"),
    ],
)
def test_limits_that_cannot_be_kept_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        best_plan(random_choices(), **options)


@pytest.mark.parametrize("share", [None, 0.02])
def test_the_smallest_budget_that_is_named_can_be_asked_for(share):
    choices = random_choices()
    with pytest.raises(ValueError, match="smallest plan takes") as error:
        best_plan(choices, 2.0, constants_share=share)
    smallest = float(str(error.value).split()[-1])
    assert best_plan(choices, smallest, constants_share=share).bits_per_parameter <= smallest
    with pytest.raises(ValueError, match="too small"):
        best_plan(choices, smallest - 0.001, constants_share=share)


def test_tables_are_checked():
    choices = random_choices()
    with pytest.raises(ValueError, match=r"bits has shape \(4, 5\): give 4 layers x 6 candidates"):
        Choices(choices.layers, NUMEL, CANDIDATES, choices.error, choices.bits[:, :5])
    with pytest.raises(ValueError, match=r"error of block\.2 is not finite"):
        Choices(choices.layers, NUMEL, CANDIDATES, choices.error * [[1], [1], [np.nan], [1]], choices.bits)
    with pytest.raises(ValueError, match="numel has 3 entries for 4 layers"):
        Choices(choices.layers, NUMEL[:3], CANDIDATES, choices.error, choices.bits)
    with pytest.raises(ValueError, match="0 layers x 6 candidates leave nothing to choose from"):
        Choices((), (), CANDIDATES, np.array([]), np.array([]))
    with pytest.raises(ValueError, match="is not a candidate: choose from"):
        uniform(choices, Candidate("nf4", 64, False))
