"""Check every rung against its readable twin on this GPU: bit for bit, or within a bound that a docstring derives.

A check raises Differs at its first difference, with the case, the entry and both values. Twins run on the CPU if bits
are compared, and on the device if the reference is a float64 product.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from math import ceil

import torch

from qlora_lab import kernels
from qlora_lab.kernels.packed_weight import PackedConstants
from qlora_lab.kernels.triton.adamw_8bit import adamw_8bit
from qlora_lab.kernels.triton.dequantize_double import dequantize_double
from qlora_lab.kernels.triton.dequantize_nf4 import dequantize_nf4
from qlora_lab.kernels.triton.double_quantize import double_dequantize, double_quantize
from qlora_lab.kernels.triton.gemv_nf4 import MAX_TOKENS, gemv_nf4
from qlora_lab.kernels.triton.launch import DTYPES
from qlora_lab.kernels.triton.matmul_nf4 import matmul_nf4
from qlora_lab.kernels.triton.matmul_nf4_backward import matmul_nf4_backward
from qlora_lab.kernels.triton.quantize_nf4 import quantize_nf4
from qlora_lab.optim import adamw_8bit as readable_adamw
from qlora_lab.quant import double_quant
from qlora_lab.quant.blocks import TINY
from qlora_lab.quant.codebook import codebook, midpoints, rounding
from qlora_lab.quant.quantize import dequantize, dequantize_blocks, quantize, quantize_blocks

HALVES = torch.bfloat16, torch.float16
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a step at 1
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


def readable(function: Callable, *arguments: object) -> object:
    """Run the readable functions, whichever device the tensors are on."""
    os.environ[kernels.OVERRIDE] = "reference"
    try:
        return function(*arguments)
    finally:
        del os.environ[kernels.OVERRIDE]


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Differs(Exception):
    """A rung differs from its twin, or did not run."""


def ran(case: str, rung: Callable, *arguments: object) -> object:
    try:
        result = rung(*arguments)
        first, *_ = arguments
        device = (first if isinstance(first, torch.Tensor) else first[0]).device
        if device.type == "cuda":  # so that a device error is reported for the rung that caused it
            torch.cuda.synchronize()
            torch.cuda.synchronize(device)
        return result
    except Exception as error:
        raise Differs(f"{rung.__name__} did not run, {case}: {first_line(error)}") from error


def _no_difference(case: str, rung: Callable, wrong: torch.Tensor, ours: torch.Tensor, twin: torch.Tensor) -> None:
    if wrong.any():
        i = int(wrong.reshape(-1).nonzero()[0])
        values = f"{ours.reshape(-1)[i].item():.9g}, its twin's is {twin.reshape(-1)[i].item():.9g}"
        many = f"{int(wrong.sum())} of {wrong.numel()} differ"
        raise Differs(f"{rung.__name__} differs from its twin, {case}: entry {i} is {values}; {many}")


def same(case: str, rung: Callable, ours: torch.Tensor, twin: torch.Tensor) -> None:
    ours = ours.cpu()
    _no_difference(case, rung, (ours != twin) & ~(ours.isnan() & twin.isnan()), ours, twin)


def near(case: str, rung: Callable, ours: torch.Tensor, exact: torch.Tensor, limit: torch.Tensor) -> None:
    _no_difference(case, rung, ~((ours.double() - exact).abs() <= limit), ours, exact)


def hard(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal weights with zeros, ties, denormals and outliers among them."""
    weight = 0.02 * torch.randn(n, generator=torch.Generator().manual_seed(n))
    weight[n // 4 : n // 4 + 71] = 0
    weight[n // 2 : n // 2 + 64] *= 2.0**-120
    ties = torch.cat([midpoints(codebook("nf4")), midpoints(codebook("fp4").sort().values), torch.ones(1)])
    weight[n // 3 : n // 3 + len(ties)] = ties[: n - n // 3]
    weight[-3:] *= 50
    return weight.to(dtype)


Check = Callable[[], None]  # raises Differs


def check_blocks(device: torch.device, n: int, block_size: int, name: str) -> Iterator[Check]:
    """Rungs 1 to 4, bit for bit; the twins run on the CPU."""
    levels = codebook(name)
    thresholds = midpoints(double_quant.dynamic_map())
    there = [t.to(device) for t in (levels, thresholds, *rounding(levels))]
    for dtype in DTYPES:
        weight = hard(n, dtype)
        case = f"{n} weights, {name}, block size {block_size}, {NAMES[dtype]}, {device}"
        packed, absmax = quantize_blocks(weight, levels, block_size)
        arguments = weight.to(device), *there[2:], block_size, TINY
        yield partial(all_same, case, quantize_nf4, arguments, (packed, absmax))
        constants = readable(double_quant.double_quantize, absmax)
        inputs = absmax.to(device), constants.absmax_offset.to(device), there[1]
        arguments = (*inputs, double_quant.GROUP_SIZE, TINY)
        twins = (constants.absmax_codes, constants.absmax_scale)
        yield partial(all_same, case, double_quantize, arguments, twins)
        plain = PackedConstants(*(t.to(device) for t in constants.plain[:-1]), double_quant.GROUP_SIZE)
        undone = readable(double_quant.double_dequantize, constants)
        yield partial(all_same, case, double_dequantize, (plain,), (undone,))
        for rung, stored, twin in ((dequantize_nf4, inputs[0], absmax), (dequantize_double, plain, undone)):
            out = torch.full((n,), -777.0, dtype=dtype, device=device)
            want = torch.empty(n, dtype=dtype)
            dequantize_blocks(packed, twin, levels, block_size, want)
            yield partial(filled, case, rung, (packed.to(device), stored, there[0], block_size, out), want)


def all_same(case: str, rung: Callable, arguments: tuple, twins: tuple) -> None:
    ours = ran(case, rung, *arguments)
    for part, twin in zip(ours if isinstance(ours, tuple) else (ours,), twins, strict=True):
        same(case, rung, part, twin)


def filled(case: str, rung: Callable, arguments: tuple, want: torch.Tensor) -> None:
    """Like all_same, for a rung that fills its last argument."""
    ran(case, rung, *arguments)
    same(case, rung, arguments[-1], want)


def bound(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far a float32 sum of products may lie from the exact one, rounded once; as in tests/kernels/triton.

    A product and a partial sum are each off by half a step (Higham, section 3.1), or a step if tensor cores truncate.
    """
    sums = x.double().abs() @ weight.double().abs()
    result = (x.double() @ weight.double()).abs()
    return 2 * len(weight) * 2.0**-24 * sums + UNIT[dtype] * (1.01 * result + torch.finfo(dtype).tiny)


def check_products(device: torch.device, rows: int, columns: int, tokens: int, double: bool) -> Iterator[Check]:
    """Rungs 5 to 7, within the bound; x and grad have the memory of transposed matrices."""
    g = torch.Generator().manual_seed(rows + tokens)
    q = readable(quantize, 0.02 * torch.randn(rows, columns, generator=g), "nf4", 64, double).to(device)
    for dtype in DTYPES:
        case = f"{rows} x {columns}, {tokens} tokens, {'double, ' * double}{NAMES[dtype]}"
        x, grad = (torch.randn(n, tokens, generator=g).to(device, dtype).t() for n in (columns, rows))
        if tokens <= MAX_TOKENS:
            weight = readable(dequantize, q, torch.float32).t()
            yield partial(multiplied, case, gemv_nf4, (x, q.plain, rows), x, weight)
        if dtype in HALVES:
            weight = readable(dequantize, q, dtype)
            A, B = (torch.randn(s, generator=g).to(device, dtype) for s in ((20, columns), (rows, 20)))
            thin = x.contiguous() @ A.t()
            whole = torch.cat([x, 2 * thin], 1)
            both = torch.cat([weight.t(), B.t()])
            yield partial(multiplied, case, matmul_nf4, (x, q.plain, rows, A, B, 2.0), whole, both)
            yield partial(multiplied, case, matmul_nf4_backward, (grad, q.plain, columns), grad, weight)


def multiplied(case: str, rung: Callable, arguments: tuple, x: torch.Tensor, weight: torch.Tensor) -> None:
    y = ran(case, rung, *arguments)
    near(case, rung, y, x.double() @ weight.double(), bound(x, weight, arguments[0].dtype))


def adamw_tables() -> tuple[torch.Tensor, ...]:
    first, second = double_quant.dynamic_map(), double_quant.dynamic_map(signed=False)
    return first, midpoints(first), second, midpoints(second)


def check_adamw(device: torch.device, n: int) -> Iterator[Check]:
    """Rung 8: the state bit for bit, the parameter within the rounding of a square root."""
    yield from (partial(stepped, device, n, dtype) for dtype in DTYPES)


def stepped(device: torch.device, n: int, dtype: torch.dtype) -> None:
    """Take three steps with both, each starting from the rung's parameter."""
    g = torch.Generator().manual_seed(n)
    tables = tuple(t.to(device) for t in adamw_tables())
    state = [torch.zeros(n, dtype=torch.uint8), torch.zeros(ceil(n / readable_adamw.BLOCK))] * 2
    twin = [torch.randn(n, generator=g).to(dtype), *(t.clone() for t in state)]
    ours = [t.to(device, copy=True) for t in twin]
    for step in (1, 2, 3):
        case = f"{n} parameters, {NAMES[dtype]}, step {step}"
        adamw = readable_adamw.AdamW(step, lr=1e-2, weight_decay=0.1)
        grad = torch.randn(n, generator=g).to(dtype)
        before = ours[0].to("cpu", copy=True)
        twin[0].copy_(before)
        ran(case, adamw_8bit, ours[0], grad.to(device), *ours[1:], tables, adamw.scalars, TINY)
        readable_adamw.adamw_8bit(twin[0], grad, readable_adamw.Moments(*twin[1:]), adamw)
        for part, want in zip(ours[1:], twin[1:], strict=True):
            same(case, adamw_8bit, part, want)
        want = twin[0].double()
        before = before.double()
        limit = 4 * UNIT[torch.float32] * ((want - before).abs() + before.abs()) + 2 * UNIT[dtype] * want.abs()
        near(case, adamw_8bit, ours[0].cpu(), want, limit)


# blocks as (weights, block size, codebook), products as (rows, columns, tokens, double quantization), parameters
SMALL = (
    [(1, 64, "nf4"), (999, 32, "fp4")],
    [(3, 64, 1, False), (40, 128, 5, True), (70, 192, 20, True)],
    [1, 2600],
)
LARGE = (
    [(77, 128, "int4"), (8197, 4096, "nf4"), (4096 * 4096 + 7, 64, "nf4")],
    [
        *((4096, 4096, tokens, True) for tokens in (1, 2, 12, 130)),
        *((576, 1536, tokens, tokens < 9) for tokens in (4, 8, 2048)),
    ],
    [2**20 + 5],
)


def checks(device: torch.device, quick: bool) -> Iterator[Check]:
    """Every rung against its twin, small cases first. The inputs of a check are made just before it runs."""
    for blocks, products, parameters in (SMALL,) if quick else (SMALL, LARGE):
        for case in blocks:
            yield from check_blocks(device, *case)
        for case in products:
            yield from check_products(device, *case)
        for n in parameters:
            yield from check_adamw(device, n)
    if device.type == "cuda" and torch.cuda.device_count() > 1:  # launched while another device is current
        yield from check_blocks(torch.device("cuda", torch.cuda.device_count() - 1), 999, 64, "nf4")


def check(device: torch.device, quick: bool) -> None:
    """Every rung against its twin. Raises Differs at the first difference."""
    for comparison in checks(device, quick):
        comparison()
