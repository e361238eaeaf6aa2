"""x W^T and g W by panels: against float64, at odd shapes, by each routine, with nothing allocated but the result."""

import pytest
import torch

from qlora_lab.kernels import cpu, few_tokens, product, words
from qlora_lab.kernels.product import Race
from qlora_lab.quant.quantize import dequantize, quantize

# Largest error over sum(|x| |w|). float32: up to 1100 products of 24 bits, summed in any order. bf16 and fp16: float32
# sums, rounded once, to 8 and 11 bits; where torch multiplies bf16 itself, the weight is rounded as well.
BOUND = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8 * 1.01, torch.float16: 2.0**-11 * 1.01}
TORCH_BFLOAT16 = 2 * BOUND[torch.bfloat16]
SHAPES = [(96, 384), (275, 96), (33, 100), (64, 64), (1, 64), (70, 1100)]


@pytest.fixture
def narrow(monkeypatch):
    """Panels and tiles so small that each of these weights takes several."""
    monkeypatch.setattr(product, "PANEL", 5000)
    monkeypatch.setattr(product, "TILE", 2000)


def poison() -> None:
    """Fill the kept buffers with NaN: a result that reads what it has not written shows it."""
    for kept in vars(product._local).values():
        kept.fill_(0xFF)


def assert_near(result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    bound = TORCH_BFLOAT16 if x.dtype == torch.bfloat16 and product.race().use_bfloat16 else BOUND[x.dtype]
    exact, size = x.double() @ weight.double(), x.double().abs() @ weight.double().abs()
    assert result.dtype == x.dtype and result.shape == exact.shape
    tiny = torch.finfo(x.dtype).smallest_normal
    worst = ((result.double() - exact).abs() / (size + tiny)).max().item()
    assert worst <= bound, f"error {worst:.2e} of the sum of magnitudes, allowed {bound:.2e}"


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_right(shape, dtype, outcome, narrow):
    rows, columns = shape
    g = torch.Generator().manual_seed(rows)
    for name, block_size, double_quant in (("nf4", 64, True), ("nf4", 4096, False), ("int3", 32, True)):
        q = quantize(0.02 * torch.randn(shape, generator=g), name, block_size, double_quant)
        weight = dequantize(q, torch.float32)
        for tokens in (1, 3, 40):
            x, grad = (torch.randn(tokens, n, generator=g).to(dtype) for n in (columns, rows))
            poison()
            assert_near(product.forward(x, q.plain, rows), x, weight.t())
            poison()
            assert_near(product.backward(grad, q.plain, columns), grad, weight)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("rows", "r"), [(96, 4), (128, 8)])  # of 128 rows and rank 8, thin.py takes bf16
def test_two_thin_matrices_are_added_to_the_weight(rows, r, dtype, outcome, narrow):
    g = torch.Generator().manual_seed(0)
    q = quantize(0.02 * torch.randn(rows, 384, generator=g), double_quant=True)
    W, A, B = dequantize(q, torch.float32), *(0.1 * torch.randn(s, generator=g) for s in ((r, 384), (rows, r)))
    bound = max(4 * torch.finfo(dtype).eps, 2.0**-19)  # of the largest: a few roundings, or float32 sums of 384 terms

    def check(result, exact, bound=bound):
        assert (result.double() - exact).abs().max() < bound * exact.abs().max()

    for tokens in (1, 3, 40):
        x, grad = (torch.randn(tokens, n, generator=g).to(dtype) for n in (384, rows))
        for run, base, left, down, up in (
            (lambda thin, x=x: product.forward(x, q.plain, rows, thin), W.t(), x, A.t(), B.t()),
            (lambda thin, grad=grad: product.backward(grad, q.plain, 384, thin), W, grad, B, A),
        ):
            low = torch.full((tokens, r), torch.nan)
            poison()
            check(run(product.Thin(down, up, low)), left.double() @ (base.double() + down.double() @ up.double()))
            check(low, left.double() @ down.double(), 2.0**-19)  # never less than float32, whatever x and the base are
            assert torch.equal(run(product.Thin(down, 0 * up, low)), run(None)), "an adapter of zero changed the result"
            poison()
            check(product.outer(low, left), low.double().t() @ left.double())


@pytest.mark.parametrize("dtype", BOUND)
def test_products_are_right_with_any_number_of_threads(dtype, outcome, threads):
    g = torch.Generator().manual_seed(0)
    q = quantize(0.02 * torch.randn(275, 384, generator=g), double_quant=True)
    weight, x, grad = dequantize(q, torch.float32), *(torch.randn(40, n, generator=g).to(dtype) for n in (384, 275))
    assert_near(product.forward(x, q.plain, 275), x, weight.t())
    assert_near(product.backward(grad, q.plain, 384), grad, weight)


@pytest.mark.parametrize("tokens", range(1, few_tokens.MAX_TOKENS + 1))
@pytest.mark.skipif(not cpu.FAST, reason="multiply_blocks needs AVX2 or AVX-512")
def test_a_few_tokens(tokens):
    """A token's result depends on nothing beside it: not on its neighbours, not on the number of threads."""
    g = torch.Generator().manual_seed(0)
    q = quantize(torch.randn(33, 192, generator=g), double_quant=True)  # an odd number of rows: the last has no partner
    x = torch.randn(tokens, 192, generator=g)
    before = torch.get_num_threads()
    y = few_tokens.multiply_blocks(x, q.plain, 33)
    assert_near(y, x, dequantize(q).t())
    assert torch.equal(torch.cat([few_tokens.multiply_blocks(row, q.plain, 33) for row in x.split(1)]), y)
    try:
        torch.set_num_threads(1)
        assert torch.equal(few_tokens.multiply_blocks(x, q.plain, 33), y)
    finally:
        torch.set_num_threads(before)


PAIRS = [(33, 192, 64), (1, 128, 128), (7, 4096, 4096)]  # two tiles and one row; a row alone; a block that is a row


@pytest.mark.long  # compiles a kernel for four numbers of tokens
@pytest.mark.parametrize("rows, columns, block_size", PAIRS)
@pytest.mark.skipif(not words.has_pairs(), reason="needs AVX512-BF16")
def test_a_few_tokens_in_pairs(rows, columns, block_size):
    """The readable twin rounds the weight to bf16 as well; then only the order of the float32 sums differs."""
    g = torch.Generator().manual_seed(0)
    q = quantize(torch.randn(rows, columns, generator=g), "nf4", block_size, True)
    x = torch.randn(16, columns, generator=g).bfloat16()
    single = torch.cat([few_tokens.multiply_blocks(row, q.plain, rows, True, torch.float32) for row in x.split(1)])
    twin = dequantize(q, torch.bfloat16).double().t()
    size = x.double().abs() @ twin.abs()
    assert ((single.double() - x.double() @ twin).abs() <= columns * 2.0**-24 * size).all()  # Higham, section 3.1
    for tokens in (2, 3, 8, 11, 16):  # each number of sums: a token's result depends on nothing beside it
        y = few_tokens.multiply_blocks(x[:tokens], q.plain, rows, True, torch.float32)
        assert torch.equal(y, single[:tokens])
    assert torch.equal(few_tokens.multiply_blocks(x, q.plain, rows, True), single.bfloat16())


@pytest.mark.long  # compiles for bf16 and for float32 results
def test_who_multiplies_a_few_tokens(outcome, monkeypatch):
    q = quantize(torch.randn(8, 128, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    in_pairs = outcome == "bfloat16" and words.has_pairs()
    rounded = in_pairs or (outcome == "bfloat16" and not cpu.FAST)  # else in a panel of bf16
    float32 = few_tokens.multiply_blocks(x.float(), q.plain, 8) if cpu.FAST else product.forward(x.float(), q.plain, 8)
    twin = dequantize(q, torch.bfloat16 if rounded else torch.float32)
    exact, size = x.double() @ twin.double().t(), x.double().abs() @ twin.double().t().abs()
    low = torch.zeros(2, 1)
    thin = product.Thin(torch.zeros(128, 1), torch.zeros(1, 8), low)
    for y in (product.forward(x, q.plain, 8), product.forward(x, q.plain, 8, thin)):
        # one rounding to bf16, and 128 additions in float32
        assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2.0**-17 * size).all()
    if cpu.FAST:  # the bound alone is too wide to tell a rounded weight from an unrounded one
        assert torch.equal(product.forward(x, q.plain, 8), few_tokens.multiply_blocks(x, q.plain, 8, in_pairs))
    monkeypatch.setattr(words, "has_pairs", lambda: False)  # as on a processor without the instruction
    if cpu.FAST:
        assert torch.equal(product.forward(x, q.plain, 8), float32.bfloat16())


def test_a_nan_stays_in_its_row():
    weight = torch.ones(4, 64)
    weight[2, 5] = torch.nan
    q = quantize(weight, keep_non_finite=True)
    for tokens in (1, 20):
        y = product.forward(torch.ones(tokens, 64), q.plain, 4)
        assert y[:, 2].isnan().all() and torch.equal(y[:, [0, 1, 3]], torch.full((tokens, 3), 64.0))


def allocated(function, *args) -> int:
    """Bytes that torch allocates in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(*args)
    return sum(e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0)


@pytest.mark.parametrize("routine", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", BOUND)
def test_nothing_is_allocated_but_the_result(dtype, routine, monkeypatch):
    product.keep(Race.won_by(routine))
    q = quantize(torch.randn(600, 2048, generator=torch.Generator().manual_seed(0)), double_quant=True)
    monkeypatch.setattr(product, "PANEL", 2**17)
    x, grad = torch.ones(50, 2048, dtype=dtype), torch.ones(50, 600, dtype=dtype)
    for step in (lambda: product.forward(x, q.plain, 600), lambda: product.backward(grad, q.plain, 2048)):
        result = step()
        assert allocated(step) == result.nbytes


@pytest.mark.parametrize("block_size", [64, 4096])
def test_the_panel_stays_small(block_size, monkeypatch):
    monkeypatch.setattr(product, "PANEL", 2**15)
    product.keep(Race.won_by("float32"))
    q = quantize(torch.ones(512, 4096), block_size=block_size)
    vars(product._local).clear()
    product.forward(torch.ones(20, 4096), q.plain, 512)
    product.backward(torch.ones(20, 512), q.plain, 4096)
    assert product._local.panel.nbytes <= 4 * 2**15


def test_learning_after_inference_mode():
    """The kept memory is first made inside, where a careless tensor could never be written to outside."""
    vars(product._local).clear()
    q = quantize(torch.ones(64, 100))
    x = torch.ones(20, 100, dtype=torch.float16)
    with torch.inference_mode():
        inside = product.forward(x, q.plain, 64)
    assert torch.equal(product.forward(x, q.plain, 64), inside)


def test_the_race_is_not_close():
    assert not Race(float32=1.0, onednn=0.7, bfloat16=0.8).use_onednn  # near a tie luck would decide between runs
    assert Race(float32=1.0, onednn=0.5, bfloat16=0.8).use_onednn
    assert not Race(float32=1.0, onednn=0.5, bfloat16=0.8).use_bfloat16
    assert not Race(float32=1.0, onednn=0.9, bfloat16=0.7).use_bfloat16
    assert Race(float32=1.0, onednn=0.9, bfloat16=0.5).use_bfloat16
    measured = product._timed()
    assert min(measured) > 0 and product._timed() is measured


@pytest.mark.parametrize("name", Race._fields)
def test_the_environment_decides_the_race(name, monkeypatch):
    monkeypatch.setenv(product.OVERRIDE, name)
    decided = product.race()
    assert (decided.use_onednn, decided.use_bfloat16) == (name == "onednn", name == "bfloat16")
    product.keep(Race.won_by("float32"))  # a resumed run goes on with what it was begun with
    assert product.race() == Race.won_by("float32")


def test_a_winner_that_cannot_be_is_refused(monkeypatch):
    monkeypatch.setenv(product.OVERRIDE, "bf16")
    with pytest.raises(ValueError, match="QLORA_LAB_PRODUCTS='bf16' is not known.*choose float32, onednn, bfloat16"):
        product.race()
    monkeypatch.setenv(product.OVERRIDE, "onednn")
    monkeypatch.setattr(product, "_has_onednn", lambda: False)
    product._decided.cache_clear()
    with pytest.raises(ValueError, match="torch lacks here: choose float32 or bfloat16"):
        product.race()
    product._decided.cache_clear()
