"""Every CPU kernel gives the bits of its readable twin: any table, dtype, block size, length, form and thread count."""

import os
import subprocess
import sys

import numba
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from qlora_lab.kernels import OVERRIDE, choose, cpu, few_tokens, product
from qlora_lab.quant.codebook import CODEBOOKS, codebook, midpoints
from qlora_lab.quant.double_quant import DoubleQuantized, double_dequantize, double_quantize
from qlora_lab.quant.quantize import WEIGHT_DTYPES, QuantizedTensor, dequantize, quantize
from tests.kernels.conftest import block_sizes, weights

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture
def reference(monkeypatch):
    """Calls a function with the readable implementation."""

    def call(function, *args, **kwargs):
        monkeypatch.setenv(OVERRIDE, "reference")
        try:
            assert choose("cpu").name == "reference"
            return function(*args, **kwargs)
        finally:
            monkeypatch.delenv(OVERRIDE)

    return call


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, the sign of zero included; a NaN equals a NaN."""
    if a.dtype not in BITS:
        return torch.equal(a, b)
    nan = a.isnan()
    kept = ~nan
    return torch.equal(nan, b.isnan()) and torch.equal(a[kept].view(BITS[a.dtype]), b[kept].view(BITS[a.dtype]))


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    ours, theirs = ([q.packed, *_constants(q.constants)] for q in (a, b))
    return all(same_bits(x, y) for x, y in zip(ours, theirs, strict=True))


def _constants(constants: torch.Tensor | DoubleQuantized) -> list[torch.Tensor]:
    if isinstance(constants, torch.Tensor):
        return [constants]
    return [constants.absmax_codes, constants.absmax_scale, constants.absmax_offset]


def poisoned(shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


anything = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@anything
@given(
    weight=weights,
    name=st.sampled_from(CODEBOOKS),
    block_size=block_sizes,
    dtype=st.sampled_from(WEIGHT_DTYPES),
    double_quant=st.booleans(),
    broken=st.sampled_from([None, torch.nan, torch.inf, -torch.inf]),
    data=st.data(),
)
def test_bits_equal_the_twin(form, reference, weight, name, block_size, dtype, double_quant, broken, data):
    weight = weight.to(dtype).nan_to_num()  # 1e30 is infinite in fp16
    double_quant = double_quant and weight.abs().max() < 1e30  # whose sum is no float32
    if broken is not None and not double_quant:
        weight[data.draw(st.integers(0, len(weight) - 1))] = broken
    how = {"codebook": name, "block_size": block_size, "double_quant": double_quant}
    how["keep_non_finite"] = not double_quant
    q = quantize(weight, **how)
    assert same(q, reference(quantize, weight, **how))
    for out in WEIGHT_DTYPES:
        want = reference(dequantize, q, out)
        assert same_bits(dequantize(q, out), want)
        assert same_bits(dequantize(q, out=poisoned(weight.shape, out)), want)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "nf3", "int8"])
def test_every_tie_and_its_neighbours(form, reference, name, dtype):
    """All midpoints in a block whose constant is 1, and the float32 values next to them."""
    ties = midpoints(codebook(name).sort().values).clamp(-1, 1)
    weight = torch.cat([ties, ties.nextafter(torch.tensor(2.0)), ties.nextafter(torch.tensor(-2.0)), torch.ones(1)])
    for filled in (len(weight), 1024):  # a partial block takes the plain loops, a whole one the vectors
        block = torch.nn.functional.pad(weight.clamp(-1, 1), (0, filled - len(weight))).to(dtype)
        assert same(quantize(block, name, block_size=1024), reference(quantize, block, name, block_size=1024))


def test_every_fp16_and_bf16_value(form, reference):
    """All 65,536 bit patterns as weights, each kind of subnormal and NaN among them."""
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        q = quantize(weight, block_size=32, keep_non_finite=True)
        assert same(q, reference(quantize, weight, block_size=32, keep_non_finite=True))


def test_rounding_of_every_size(form, reference):
    """To fp16 and bf16 through 16 odd levels: normal, subnormal and overflowing values, each to nearest even."""
    levels = codebook("nf4")
    constants = torch.logspace(-45, 38.5, 4000, dtype=torch.float64).float()
    packed = torch.arange(16, dtype=torch.uint8).mul(17).repeat(4000)  # each code twice in a block of 32
    q = QuantizedTensor(packed, constants, levels, "nf4", 32, torch.Size([32 * 4000]), torch.float32)
    for dtype in WEIGHT_DTYPES:
        assert same_bits(dequantize(q, dtype), reference(dequantize, q, dtype))


@anything
@given(absmax=st.lists(st.floats(0, 2.0**99, width=32), min_size=1, max_size=600), extra=st.integers(0, 40000))
def test_double_quantization_equals_the_twin(reference, absmax, extra):
    absmax = torch.cat([torch.tensor(absmax), torch.rand(extra, generator=torch.Generator().manual_seed(extra))])
    ours, theirs = double_quantize(absmax), reference(double_quantize, absmax)
    assert all(same_bits(a, b) for a, b in zip(_constants(ours), _constants(theirs), strict=True))
    assert same_bits(double_dequantize(ours), reference(double_dequantize, ours))


def test_threads_change_nothing(form):
    weight = torch.randn(700, 1536, generator=torch.Generator().manual_seed(0))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            q = quantize(weight, double_quant=True)
            assert numba.get_num_threads() == min(threads, numba.config.NUMBA_NUM_THREADS)
            assert torch.get_num_threads() == threads
            results.append([q.packed, *_constants(q.constants), dequantize(q, torch.bfloat16), q.absmax])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_part_of_a_weight(form):
    """The range and the stride that panels are decoded with, from block starts and from the middle of a byte."""
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    for how in (("nf4", 32, True), ("nf4", 64, False), ("nf4", 50, False), ("nf3", 32, True)):
        q = quantize(weight, *how)
        whole = dequantize(q, torch.float32)
        for first, stop in ((0, 3), (2, 40), (39, 40)):
            rows = poisoned((stop - first, 96), torch.float32)
            cpu.dequantize_blocks(q.plain, rows, first * 96)
            assert torch.equal(rows, whole[first:stop])
        for first, stop in ((0, 32), (64, 96), (5, 7), (3, 80)):
            for dtype in WEIGHT_DTYPES:
                columns = poisoned((40, stop - first), dtype)
                cpu.dequantize_blocks(q.plain, columns, first, 96)
                assert torch.equal(columns, whole[:, first:stop].to(dtype))


def test_a_weight_that_is_not_contiguous(form):
    weight = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    for strided in (weight.t(), weight[:, ::2], weight[3:, 7:], weight.expand(2, 64, 50)):
        assert same(quantize(strided), quantize(strided.contiguous()))


def test_a_copy_of_a_tensor_has_its_own_view():
    """Kernels keep numpy's view of the bytes: a changed or moved copy must not read its original's."""
    import copy
    import dataclasses

    q = quantize(torch.ones(64))
    dequantize(q)
    twice = dataclasses.replace(q, constants=q.constants * 2)
    other = copy.deepcopy(q)
    other.packed.zero_()
    assert dequantize(twice)[0] == 2 and dequantize(other)[0] == -1 and dequantize(q)[0] == 1


def test_tensors_that_a_kernel_would_misread_are_refused():
    import dataclasses

    q, nested = quantize(torch.ones(128)), quantize(torch.ones(128), double_quant=True)
    codes = nested.constants
    for bad, message in (
        (
            dataclasses.replace(q, shape=torch.Size([4096])),
            "4096 weights need 2048 bytes and 64 constants, but .* 64 and 2",
        ),
        (
            dataclasses.replace(q, constants=q.constants[:1]),
            "128 weights need 64 bytes and 2 constants, but .* 64 and 1",
        ),
        (dataclasses.replace(q, constants=q.constants.double()), r"absmax is torch.float64, \(2,\) and contiguous"),
        (dataclasses.replace(q, packed=q.packed.repeat(2)[::2]), r"packed is torch.uint8, \(64,\) and not contiguous"),
        (
            dataclasses.replace(nested, constants=dataclasses.replace(codes, absmax_codes=codes.absmax_codes.int())),
            "int32",
        ),
        (
            dataclasses.replace(nested, constants=dataclasses.replace(codes, absmax_scale=torch.ones(0))),
            "128 weights need",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            dequantize(bad)
    with pytest.raises(ValueError, match="8192 weights need"):
        few_tokens.multiply_blocks(torch.ones(1, 128), q.plain, 64)


def test_defaults_of_torch_do_not_matter():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    q = quantize(weight, double_quant=True)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            again = quantize(weight, double_quant=True)
            assert same(again, q) and again.absmax.dtype == torch.float32
            assert dequantize(again).dtype == torch.float32
            assert product.forward(weight[:3], q.plain, 64).dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_tensor_that_moves_to_shared_memory():
    q = quantize(torch.ones(64))
    dequantize(q)
    q.packed.share_memory_()
    assert torch.equal(dequantize(q), torch.ones(64))


def test_into_a_parameter():
    layer = torch.nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        dequantize(quantize(torch.ones(8, 8)), out=layer.weight)
    assert torch.equal(layer.weight.detach(), torch.ones(8, 8))
    with pytest.raises(ValueError, match="out is on meta, but the quantised weight on cpu"):
        dequantize(quantize(torch.ones(8)), out=torch.ones(8, device="meta"))


@pytest.mark.slow
def test_the_first_kernel_leaves_torchs_threads_alone():
    code = """
import torch
from qlora_lab.quant.quantize import quantize
torch.set_num_threads(1)
quantize(torch.ones(64))
print(torch.get_num_threads())
"""
    assert run(code).strip() == "1"


def test_what_runs_and_why(monkeypatch):
    form = "16 look-ups at once" if cpu.FAST else "plain loops"
    assert choose("cpu").name == "cpu" and choose("cpu").blocks is cpu and form in choose("cpu").why
    assert choose("mps") == ("reference", "there is no kernel for mps", None, None, None)
    monkeypatch.setenv(OVERRIDE, "reference")
    assert choose("cpu").blocks is None and OVERRIDE in choose("cpu").why
    monkeypatch.setenv(OVERRIDE, "fastest")
    with pytest.raises(ValueError, match="QLORA_LAB_KERNELS='fastest' is not known: leave it unset"):
        quantize(torch.ones(64))


CHECK = """
import os, sys, warnings
os.environ["QLORA_LAB_KERNELS"] = "reference"
import torch
from qlora_lab.quant.quantize import dequantize, quantize
q = quantize(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
want = dequantize(q)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from qlora_lab.kernels import few_tokens
    x = torch.eye(128)[:2]
    assert torch.equal(few_tokens.multiply_blocks(x, q.plain, 64), want.t()[:2])
    assert torch.equal(few_tokens.multiply_blocks(x, q.plain, 64), want.t()[:2])
print([str(w.message) for w in caught])
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not cpu.FAST, reason="multiply_blocks needs AVX2 or AVX-512")
def test_no_cache_folder_that_can_be_written():
    nowhere = "import numba.core.caching as c; c.CacheImpl._locator_classes = []\n"  # root may write everywhere
    message = run(nowhere + CHECK)
    assert message.count("compiled kernels cannot be kept, so every start") == 1, message
    assert "set NUMBA_CACHE_DIR to a folder with space" in message


@pytest.mark.slow
@pytest.mark.skipif(not cpu.FAST, reason="multiply_blocks needs AVX2 or AVX-512")
def test_a_full_disk(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"  # bytes a file may hold
    message = run(limit + CHECK, NUMBA_CACHE_DIR=str(tmp_path))
    assert message.count("compiled kernels cannot be kept, so every start") == 1, message


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_falls_back():
    code = """
import os, torch
from qlora_lab.kernels import choose
from qlora_lab.quant.quantize import dequantize, quantize
q = quantize(torch.ones(64, 64))
torch.set_num_threads(1)
if not (child := os.fork()):
    os._exit(0 if choose("cpu").name == "reference" and dequantize(quantize(torch.ones(9)))[0] == 1 else 1)
print(os.waitpid(child, 0)[1], choose("cpu").name)
"""
    assert run(code).split() == ["0", "cpu"]
