"""Every rung against its readable twin, interpreted on the CPU: bit for bit, or within a bound that a line derives."""

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from qlora_lab.kernels import OVERRIDE
from qlora_lab.kernels.triton.adamw_8bit import adamw_8bit
from qlora_lab.kernels.triton.dequantize_double import dequantize_double
from qlora_lab.kernels.triton.dequantize_nf4 import dequantize_nf4
from qlora_lab.kernels.triton.double_quantize import double_dequantize, double_quantize
from qlora_lab.kernels.triton.gemv_nf4 import gemv_nf4
from qlora_lab.kernels.triton.matmul_nf4 import matmul_nf4
from qlora_lab.kernels.triton.matmul_nf4_backward import matmul_nf4_backward
from qlora_lab.kernels.triton.quantize_nf4 import quantize_nf4
from qlora_lab.optim import adamw_8bit as readable
from qlora_lab.quant import double_quant
from qlora_lab.quant.blocks import TINY, block_absmax, scale_blocks, to_blocks
from qlora_lab.quant.codebook import codebook, midpoints, nearest_codes, rounding, zero_code
from qlora_lab.quant.packing import pack
from qlora_lab.quant.quantize import dequantize, dequantize_blocks, quantize, quantize_blocks
from tests.kernels.conftest import weights

pytestmark = [
    pytest.mark.slow,  # six seconds together
    pytest.mark.filterwarnings(  # numpy's, for 1e38 / 1e-38 and for inf / inf
        "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning"
    ),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a step at 1
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
SIXTEEN = ["nf4", "fp4", "int4", "e2m1", "e3m0"]  # codes of 4 bits, 15 or 16 levels
POISON = -777.0
few = settings(max_examples=10)


@pytest.fixture(autouse=True, scope="module")
def _twins():
    """Readable functions beside the kernels, and NaN in all memory that torch hands out, so that gaps would show."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(OVERRIDE, "reference")
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


def test_memory_is_poisoned():
    assert torch.empty(3).isnan().all() and torch.empty(3, dtype=torch.uint8).eq(255).all()


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, POISON, dtype=dtype)


# ---------------------------------------------------------------------------------------------------- rungs 1 to 4


@few
@given(weights, st.sampled_from(BLOCK_SIZES), st.sampled_from(SIXTEEN), st.sampled_from(DTYPES))
@example(torch.zeros(1), 64, "nf4", torch.float32)
@example(torch.full((130,), torch.inf), 64, "fp4", torch.bfloat16)
def test_quantize(weight, block_size, name, dtype):
    weight, levels = weight.to(dtype), codebook(name)
    packed, absmax = quantize_nf4(weight, *rounding(levels), block_size, TINY)
    want_packed, want_absmax = quantize_blocks(weight, levels, block_size)
    assert torch.equal(packed, want_packed)
    assert torch.equal(absmax.nan_to_num(-1), want_absmax.nan_to_num(-1))


@pytest.mark.parametrize("name", ["nf3", "nf2", "int3"])
def test_shorter_tables_take_four_bits_a_code(name):
    levels = codebook(name)
    weight = torch.randn(999, generator=torch.Generator().manual_seed(0))
    packed, absmax = quantize_nf4(weight, *rounding(levels), 64, TINY)
    blocks = to_blocks(weight, 64)
    codes = nearest_codes(scale_blocks(blocks, block_absmax(blocks)), levels).view(-1)[:999]
    assert torch.equal(packed, pack(codes, 4, zero_code(levels)))
    out = poisoned(999)
    dequantize_nf4(packed, absmax, levels, 64, out)
    assert torch.equal(out, levels[codes.int()] * absmax.repeat_interleave(64)[:999])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_weight_spoils_its_block_alone(bad):
    weight = torch.ones(200)
    weight[70] = bad
    packed, absmax = quantize_nf4(weight, *rounding(codebook("nf4")), 64, TINY)
    assert absmax.isnan().tolist() == [False, True, False, False]
    assert packed[32:64].eq(0x77).all() and packed[:32].eq(0xFF).all()


def test_ties_go_to_the_lower_level():
    for name in SIXTEEN:
        levels = codebook(name)
        ties = torch.cat([midpoints(levels.sort().values), torch.ones(1)])
        packed, _ = quantize_nf4(ties, *rounding(levels), 32, TINY)
        assert torch.equal(packed, quantize_blocks(ties, levels, 32)[0])


@few
@given(weights, st.sampled_from(BLOCK_SIZES), st.sampled_from(SIXTEEN), st.sampled_from(DTYPES))
def test_dequantize(weight, block_size, name, dtype):
    levels = codebook(name)
    packed, absmax = quantize_blocks(weight, levels, block_size)
    out, want = poisoned(len(weight), dtype=dtype), torch.empty(len(weight), dtype=dtype)
    dequantize_nf4(packed, absmax, levels, block_size, out)
    dequantize_blocks(packed, absmax, levels, block_size, want)
    assert torch.equal(out.nan_to_num(7), want.nan_to_num(7))


@few
@given(st.integers(1, 9000), st.sampled_from(BLOCK_SIZES), st.sampled_from(DTYPES), st.sampled_from([1e-30, 1.0, 1e30]))
def test_dequantize_double(n, block_size, dtype, size):
    g = torch.Generator().manual_seed(n)
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=g)
    constants = double_quant.double_quantize(size * torch.rand(-(-n // block_size), generator=g))
    out, want = poisoned(n, dtype=dtype), torch.empty(n, dtype=dtype)
    dequantize_double(packed, constants.plain, codebook("nf4"), block_size, out)
    dequantize_blocks(packed, double_quant.double_dequantize(constants), codebook("nf4"), block_size, want)
    assert torch.equal(out, want)


@few
@given(st.integers(1, 3000), st.sampled_from([1e-38, 1e-3, 1.0, 1e34]))
def test_double_quantize(n, size):
    absmax = size * torch.rand(n, generator=torch.Generator().manual_seed(n))
    want = double_quant.double_quantize(absmax)
    thresholds = midpoints(double_quant.dynamic_map())
    codes, scale = double_quantize(absmax, want.absmax_offset, thresholds, double_quant.GROUP_SIZE, TINY)
    assert torch.equal(codes, want.absmax_codes) and torch.equal(scale, want.absmax_scale)
    assert torch.equal(double_dequantize(want.plain), double_quant.double_dequantize(want))


# ------------------------------------------------------------------------------------------------------- products


def bound(x: torch.Tensor, weight: torch.Tensor, terms: int, dtype: torch.dtype) -> torch.Tensor:
    """How far a float32 sum of `terms` products may lie from the exact one, in any order, rounded once to `dtype`.

    Each product and each partial sum is off by half a step of itself: terms * 2^-24 * sum |x w| (Higham, section 3.1;
    twice that covers the constant's own roundings), and half a step of the result.
    """
    sums = x.double().abs() @ weight.double().abs()
    result = (x.double() @ weight.double()).abs() * 1.01 + torch.finfo(dtype).tiny  # below it, steps are all the same
    return 2 * terms * 2.0**-24 * sums + UNIT[dtype] * result


def case(rows: int, columns: int, block_size: int, double: bool, tokens: int, dtype: torch.dtype):
    """A quantised weight, and x with the memory of a transposed matrix: not contiguous."""
    g = torch.Generator().manual_seed(rows * columns + tokens)
    q = quantize(0.02 * torch.randn(rows, columns, generator=g), "nf4", block_size, double)
    x, grad = (torch.randn(n, tokens, generator=g).to(dtype).t() for n in (columns, rows))
    return q, x, grad


shapes = st.tuples(
    st.integers(1, 70), st.integers(1, 5), st.sampled_from([32, 64, 128]), st.booleans(), st.integers(1, 8)
)


@few
@given(shapes, st.sampled_from(DTYPES))
@example((3, 20, 64, True, 1), torch.bfloat16)  # more columns than one tile
def test_gemv(shape, dtype):
    rows, n_blocks, block_size, double, tokens = shape
    q, x, _ = case(rows, n_blocks * block_size, block_size, double, tokens, dtype)
    y, weight = gemv_nf4(x, q.plain, rows), dequantize(q, torch.float32).t()
    assert y.dtype == dtype and y.shape == (tokens, rows)
    assert ((y.double() - x.double() @ weight.double()).abs() <= bound(x, weight, len(weight), dtype)).all()


@few
@given(shapes, st.integers(0, 40), st.sampled_from(HALVES))
@example((150, 3, 64, True, 1), 140, torch.bfloat16)  # more than one tile of rows and of tokens
def test_matmul(shape, more, dtype):
    rows, n_blocks, block_size, double, tokens = shape
    q, x, _ = case(rows, n_blocks * block_size, block_size, double, tokens + more, dtype)
    y, weight = matmul_nf4(x, q.plain, rows), dequantize(q, dtype).t()  # rounded to dtype, as the twin's
    assert ((y.double() - x.double() @ weight.double()).abs() <= bound(x, weight, len(weight), dtype)).all()


@few
@given(shapes, st.integers(0, 40), st.sampled_from(HALVES))
@example((150, 3, 64, True, 1), 140, torch.bfloat16)
def test_backward(shape, more, dtype):
    rows, n_blocks, block_size, double, tokens = shape
    q, _, grad = case(rows, n_blocks * block_size, block_size, double, tokens + more, dtype)
    out, weight = matmul_nf4_backward(grad, q.plain, q.shape[1]), dequantize(q, dtype)
    assert ((out.double() - grad.double() @ weight.double()).abs() <= bound(grad, weight, rows, dtype)).all()


@pytest.mark.parametrize("name", SIXTEEN)
@pytest.mark.parametrize(
    "block_size", [pytest.param(b, marks=pytest.mark.slow if b > 1024 else ()) for b in BLOCK_SIZES]
)
def test_products_take_every_table_and_block_size(block_size, name):
    g = torch.Generator().manual_seed(block_size)
    columns = 3 * block_size if block_size <= 128 else block_size
    q = quantize(0.02 * torch.randn(3, columns, generator=g), name, block_size, True)
    x, grad = torch.randn(2, columns, generator=g).bfloat16(), torch.randn(2, 3, generator=g).bfloat16()
    exact, rounded = (dequantize(q, dtype) for dtype in (torch.float32, torch.bfloat16))
    for result, left, right in (
        (gemv_nf4(x, q.plain, 3), x, exact.t()),
        (matmul_nf4(x, q.plain, 3), x, rounded.t()),
        (matmul_nf4_backward(grad, q.plain, columns), grad, rounded),
    ):
        limit = bound(left, right, len(right), torch.bfloat16)
        assert ((result.double() - left.double() @ right.double()).abs() <= limit).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rank", [1, 8, 20, 70])
def test_the_adapter_is_added_to_the_same_sums(rank, dtype):
    q, x, _ = case(40, 128, 64, True, 9, dtype)
    g = torch.Generator().manual_seed(rank)
    lora_A, lora_B = torch.randn(rank, 128, generator=g).to(dtype), torch.randn(40, rank, generator=g).to(dtype)
    y, weight = matmul_nf4(x, q.plain, 40, lora_A, lora_B, 2.0), dequantize(q, dtype).t()
    thin = x @ lora_A.t()
    want = x.double() @ weight.double() + 2 * thin.double() @ lora_B.double().t()
    limit = bound(torch.cat([x, 2 * thin], 1), torch.cat([weight, lora_B.t()]), 128 + rank, dtype)
    assert ((y.double() - want).abs() <= limit).all()


def test_a_token_does_not_depend_on_those_beside_it():
    q, x, _ = case(40, 128, 64, True, 8, torch.float32)
    assert torch.equal(gemv_nf4(x, q.plain, 40)[:1], gemv_nf4(x[:1].expand(8, -1), q.plain, 40)[:1])


# ---------------------------------------------------------------------------------------------------------- AdamW


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])  # the square of the last is infinite
def test_a_bad_gradient_spoils_its_block_alone(bad):
    first, second = double_quant.dynamic_map(), double_quant.dynamic_map(signed=False)
    tables = first, midpoints(first), second, midpoints(second)
    state = [torch.zeros(600, dtype=torch.uint8), torch.zeros(3)] * 2
    ours, twin = ([torch.ones(600), *(t.clone() for t in state)] for _ in range(2))
    grad = torch.ones(600)
    grad[300] = bad
    how = readable.AdamW(step=1, lr=1e-2)
    adamw_8bit(ours[0], grad, *ours[1:], tables, how.scalars, TINY)
    readable.adamw_8bit(twin[0], grad, readable.Moments(*twin[1:]), how)
    for a, b in zip(ours[1:], twin[1:], strict=True):
        assert torch.equal(a.float().nan_to_num(-1), b.float().nan_to_num(-1))
    assert ours[4].isnan().tolist() == [False, True, False]


@few
@given(st.integers(1, 2600), st.sampled_from(DTYPES), st.sampled_from([1e-6, 1.0, 1e4]))
def test_adamw(n, dtype, size):
    g = torch.Generator().manual_seed(n)
    first, second = double_quant.dynamic_map(), double_quant.dynamic_map(signed=False)
    tables = first, midpoints(first), second, midpoints(second)
    n_blocks = -(-n // readable.BLOCK)
    state = [torch.zeros(n, dtype=torch.uint8), torch.zeros(n_blocks)] * 2
    given = torch.randn(n, generator=g).to(dtype)
    ours, twin = ([given.clone(), *(t.clone() for t in state)] for _ in range(2))
    for step in (1, 2, 3):
        how = readable.AdamW(step=step, lr=1e-2, weight_decay=0.1)
        grad = (size * torch.randn(n, generator=g)).to(dtype)
        adamw_8bit(ours[0], grad, *ours[1:], tables, how.scalars, TINY)
        readable.adamw_8bit(twin[0], grad, readable.Moments(*twin[1:]), how)
        assert all(torch.equal(a, b) for a, b in zip(ours, twin, strict=True)), step
