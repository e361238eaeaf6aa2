"""The rungs as operations of torch, what choose() makes of them, and what their launchers refuse."""

import subprocess
import sys

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from qlora_lab import kernels
from qlora_lab.kernels import OVERRIDE, choose
from qlora_lab.kernels.packed_weight import PackedConstants
from qlora_lab.kernels.triton import adamw_8bit as rung8, dispatch, ops
from qlora_lab.kernels.triton.adamw_8bit import adamw_8bit
from qlora_lab.kernels.triton.dequantize_double import dequantize_double
from qlora_lab.kernels.triton.dequantize_nf4 import dequantize_nf4
from qlora_lab.kernels.triton.double_quantize import double_quantize
from qlora_lab.kernels.triton.gemv_nf4 import gemv_nf4
from qlora_lab.kernels.triton.launch import MAX_NUMEL, check_numel
from qlora_lab.kernels.triton.matmul_nf4 import TOKENS, matmul_nf4
from qlora_lab.kernels.triton.quantize_nf4 import quantize_nf4
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.optim import adamw_8bit as readable_adamw
from qlora_lab.quant import double_quant
from qlora_lab.quant.blocks import TINY
from qlora_lab.quant.codebook import codebook, midpoints, rounding
from qlora_lab.quant.double_quant import dynamic_map
from qlora_lab.quant.quantize import dequantize, quantize

pytestmark = pytest.mark.slow  # seven seconds together

ROWS, COLUMNS, RANK = 6, 64, 3
bf16 = torch.bfloat16


def weight(double: bool = True, columns: int = COLUMNS, block_size: int = 32):
    return quantize(torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(0)), "nf4", block_size, double)


def parts(q) -> tuple:
    return q.packed, *dispatch._parts(q.plain.constants), q.levels, q.block_size


def leaf(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype).requires_grad_()


def samples() -> dict:
    q, plain, absmax = weight(), weight(double=False), torch.rand(300)
    map_, x = dynamic_map(), torch.randn(5, COLUMNS)
    state = [t.clone() for t in [torch.zeros(300, dtype=torch.uint8), torch.zeros(2)] * 2]
    tables = [map_, midpoints(map_)] * 2
    return {
        "quantize_nf4": (torch.randn(99), *rounding(codebook("nf4")), 32, TINY),
        "dequantize_nf4": (*parts(plain), ROWS * COLUMNS, bf16),
        "dequantize_into": (*parts(q), torch.empty(ROWS * COLUMNS)),
        "double_quantize": (absmax, absmax.mean(), midpoints(map_), 256, TINY),
        "double_dequantize": (parts(q)[1], 256),
        "gemv_nf4": (x, *parts(q), ROWS),
        "matmul_nf4": (leaf(5, COLUMNS), *parts(q), ROWS, leaf(RANK, COLUMNS), leaf(ROWS, RANK), 2.0),
        "matmul_nf4_backward": (torch.randn(5, ROWS).to(bf16), *parts(plain), COLUMNS),
        "adamw_8bit": (torch.randn(300), torch.randn(300), *state, tables, [0.9, 0.99, 1, 1, 1, 1], TINY),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", samples())
def test_torch_finds_nothing_wrong_with_the_operation(name):
    torch.library.opcheck(getattr(torch.ops.qlora_lab, name).default, samples()[name], rtol=0.02, atol=0.02)


def test_gradients_are_those_of_the_formula_in_float64():
    q, x = weight(), leaf(5, COLUMNS)
    lora_A, lora_B, grad = leaf(RANK, COLUMNS), leaf(ROWS, RANK), leaf(5, ROWS).detach()
    ops.matmul_nf4(x, *parts(q), ROWS, lora_A, lora_B, 0.5).backward(grad)
    exact = [t.detach().double().requires_grad_() for t in (x, lora_A, lora_B)]
    ready = dequantize(q, bf16).double()
    (exact[0] @ ready.t() + 0.5 * exact[0] @ exact[1].t() @ exact[2].t()).backward(grad.double())
    for ours, theirs in zip((x, lora_A, lora_B), exact, strict=True):
        distance = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert distance < 2**-7, distance  # two bf16 roundings on the way, each at most 2^-8 of a term


@pytest.mark.parametrize("operation", ["gemv_nf4", "matmul_nf4"])
def test_gradients_without_an_adapter(operation):
    q, x, grad = weight(), leaf(5, COLUMNS), leaf(5, ROWS).detach()
    no_adapter = (None, None, 1.0) if operation == "matmul_nf4" else ()
    getattr(ops, operation)(x, *parts(q), ROWS, *no_adapter).backward(grad)
    exact = grad.double() @ dequantize(q, bf16).double()
    assert (x.grad.double() - exact).norm() < 2**-8 * exact.norm()  # one rounding to bf16


def test_one_graph_serves_every_number_of_tokens():
    q, graphs = weight(), []
    torch._dynamo.reset()

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    arguments = *parts(q), ROWS, None, None, 1.0
    compiled = torch.compile(lambda x: ops.matmul_nf4(x, *arguments) * 2, backend=backend, dynamic=True)
    for tokens in (3, 5, 7, 9):
        assert compiled(torch.ones(tokens, COLUMNS, dtype=bf16)).shape == (tokens, ROWS)
    assert len(graphs) == 1


def test_a_table_first_used_in_inference_mode_serves_training():
    double_quant._map_on.cache_clear()
    with torch.inference_mode():
        dequantize(weight())
    x = leaf(5, COLUMNS)
    ops.matmul_nf4(x, *parts(weight()), ROWS, None, None, 1.0).sum().backward()
    assert x.grad is not None


def test_compiled_and_eager_are_the_same():
    q, x = weight(), leaf(5, COLUMNS).detach()
    arguments = *parts(q), ROWS, None, None, 1.0
    compiled = torch.compile(lambda x: ops.matmul_nf4(x, *arguments).float().relu(), backend="aot_eager")
    assert torch.equal(compiled(x), ops.matmul_nf4(x, *arguments).float().relu())


# ------------------------------------------------------------------------------------------------------- choose()


@pytest.fixture
def on_the_gpu(monkeypatch):
    """choose() as on a machine with CUDA; the interpreter takes CPU tensors."""
    monkeypatch.setattr(kernels, "choose", lambda device="cpu": choose("cuda"))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("nf4", bf16), ("fp4", torch.float32), ("int4", torch.float16), ("int8", torch.float32), ("int8", bf16)],
)
def test_the_library_on_a_gpu_gives_the_same_bytes(name, dtype, double, on_the_gpu, monkeypatch):
    given = torch.randn(50, 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    q, value = quantize(given, name, 64, double), None
    value = dequantize(q, bf16)
    monkeypatch.setattr(kernels, "choose", choose)
    twin = quantize(given, name, 64, double)
    assert torch.equal(q.packed, twin.packed) and torch.equal(q.absmax, twin.absmax)
    assert torch.equal(value, dequantize(twin, bf16))


@pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning"
)  # numpy's: of values that the kernel then leaves out
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_block_that_is_not_finite_on_a_gpu(name, on_the_gpu, monkeypatch):
    weight = torch.randn(300)
    weight[100] = torch.nan
    weight[101] = 5.0  # over the smallest constant, as which a NaN counts: beyond float32
    q = quantize(weight, name, 64, keep_non_finite=True)
    monkeypatch.setattr(kernels, "choose", choose)
    twin = quantize(weight, name, 64, keep_non_finite=True)
    assert torch.equal(q.packed, twin.packed) and torch.equal(q.absmax.isnan(), twin.absmax.isnan())


def test_a_step_of_adamw_on_a_gpu(monkeypatch):
    grad, state = torch.randn(600), [torch.zeros(n, dtype=t) for n, t in 2 * [(600, torch.uint8), (3, torch.float32)]]
    ours, twin = ([torch.ones(600), *(t.clone() for t in state)] for _ in range(2))
    how = readable_adamw.AdamW(1, lr=1e-2)
    readable_adamw.adamw_8bit(twin[0], grad, readable_adamw.Moments(*twin[1:]), how)
    monkeypatch.setattr(readable_adamw, "choose", lambda device: choose("cuda"))
    readable_adamw.change_8bit(ours[0], grad, readable_adamw.Moments(*ours[1:]), how)
    assert all(torch.equal(a, b) for a, b in zip(ours, twin, strict=True))
    assert choose("cuda").adamw is rung8


@pytest.mark.parametrize("tokens", [1, 20, TOKENS + 1])
@pytest.mark.parametrize("columns", [64, 72])  # whole blocks in a row, and not
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "nf4"), (bf16, "nf4"), (bf16, "int8")])
def test_a_layer_on_a_gpu(tokens, columns, dtype, name, on_the_gpu):
    layer = Linear4bit(quantize(torch.randn(ROWS, columns), name, 32, True))
    x, grad = leaf(tokens, columns, dtype=dtype), torch.ones(tokens, ROWS, dtype=dtype)
    y = layer(x)
    y.backward(grad)
    ready = dequantize(layer.weight, dtype)
    near = {"rtol": 2**-7, "atol": 2**-5} if dtype == bf16 else {"rtol": 1e-5, "atol": 1e-5}
    assert torch.allclose(y, x @ ready.t(), **near) and torch.allclose(x.grad, grad @ ready, **near)


@pytest.mark.parametrize(
    ("levels", "tokens", "operation"),
    [
        (codebook("nf4"), 1, "gemv_nf4"),
        (codebook("nf4"), 9, "matmul_nf4"),
        (codebook("nf4"), 17, "dequantize_into"),
        (dynamic_map(), 1, "double_dequantize"),  # 256 levels
    ],
)
def test_a_compiled_product_keeps_the_rung_in_its_graph(levels, tokens, operation):
    plain, graphs = quantize(torch.randn(ROWS, COLUMNS), levels, 32, True).plain, []

    def product(x):
        return dispatch.forward(x, plain, ROWS)

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    x = leaf(tokens, COLUMNS).detach()
    assert torch.equal(torch.compile(product, backend=backend, fullgraph=True)(x), product(x))
    (code,) = graphs
    assert f"qlora_lab.{operation}" in code


@pytest.mark.parametrize("block_size", [32, 64])
def test_a_weight_is_checked_once_for_each_shape(block_size):
    plain, x = (
        quantize(torch.randn(2 * block_size, block_size), "nf4", block_size, True).plain,
        torch.ones(1, block_size),
    )
    gemv_nf4(x, plain, 2 * block_size)
    shape, parts = plain.prepared
    gemv_nf4(x, plain, 2 * block_size)
    assert plain.prepared[1] is parts and shape[:2] == (2 * block_size, block_size)
    with refused("packed has shape"):
        gemv_nf4(x, plain, block_size)


@pytest.mark.parametrize(("name", "block_size"), [("nf3", 64), ("int5", 64), ("nf4", 100), ("nf4", 16)])
def test_what_no_rung_takes_is_left_to_the_readable_functions(name, block_size, on_the_gpu):
    given = torch.randn(10, 100)
    q = quantize(given, name, block_size)
    assert kernels.blocks_for("cuda", len(q.levels), block_size) is None
    assert (dequantize(q) - given).abs().max() < 1.5


def test_choose():
    assert choose("cuda").name == "triton" and choose("cuda").blocks is dispatch


def test_where_triton_does_not_start_the_readable_functions_run(monkeypatch):
    class NoCompiler:
        def get_current_target(self):
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    class OtherMaker:
        def get_current_target(self):
            return GPUTarget("hip", "gfx942", 64)

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for active, why in (
        (NoCompiler(), "Triton does not start: Failed to find C compiler."),
        (OtherMaker(), "the kernels are written for NVIDIA GPUs from sm_75 on, this is hip gfx942"),
    ):
        monkeypatch.setattr(driver, "_active", active)
        kernels._choose.cache_clear()
        assert choose("cuda") == ("reference", why, None, None, None)
    kernels._choose.cache_clear()


@pytest.mark.slow
def test_without_triton_everything_else_works(monkeypatch):
    code = (
        "import sys; sys.modules['triton'] = None; import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "from qlora_lab.kernels import choose; import qlora_lab as ql, torch\n"
        "print(choose('cuda').why); print(ql.dequantize(ql.quantize(torch.ones(64)))[0].item())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["Triton is not installed: it exists for Linux", "1.0"]


def test_the_override_holds_on_a_gpu(monkeypatch):
    monkeypatch.setenv(OVERRIDE, "reference")
    assert choose("cuda").name == "reference"


# ------------------------------------------------------------------------------------------------------ bad input


def refused(message: str):
    return pytest.raises(ValueError, match=message)


def test_launchers_refuse_what_does_not_match(monkeypatch):
    q, out = weight(double=False), torch.empty(ROWS * COLUMNS)
    packed, absmax, levels = q.packed, q.constants, q.levels
    th, order = rounding(levels)
    with refused("packed has shape .*: it must be flat, with 192 entries"):
        dequantize_nf4(packed[:-1], absmax, levels, 32, out)
    with refused("absmax has shape .*: it must be flat, with 12 entries"):
        dequantize_nf4(packed, absmax[:-1], levels, 32, out)
    with refused("packed is int32: it must be uint8"):
        dequantize_nf4(packed.int(), absmax, levels, 32, out)
    with refused("levels has shape .*: a 4-bit code has 2 to 16"):
        dequantize_nf4(packed, absmax, torch.ones(17), 32, out)
    with refused("block_size=48 is not allowed: kernels take a power of two, 32 to 4096"):
        dequantize_nf4(packed, absmax, levels, 48, out)
    with refused("block_size=8192 is not allowed"):
        quantize_nf4(torch.ones(9), th, order, 8192, TINY)
    with refused("out is int64: it must be float32, bfloat16, float16"):
        dequantize_nf4(packed, absmax, levels, 32, out.long())
    with refused("not contiguous"):
        dequantize_nf4(packed, absmax, levels, 32, out.view(ROWS, COLUMNS).t())
    empty = PackedConstants(torch.zeros(12, dtype=torch.uint8), torch.ones(0), torch.ones(()), dynamic_map(), 256)
    with refused("absmax_scale has shape .*: it must be flat, with 1 entries"):
        dequantize_double(packed, empty, levels, 32, out)
    short = empty._replace(scale=torch.ones(1), table=dynamic_map()[:-1])
    with refused("table of constants has shape .*: it must be flat, with 256 entries"):
        dequantize_double(packed, short, levels, 32, out)
    with refused("weight is float64"):
        quantize_nf4(torch.ones(9, dtype=torch.float64), th, order, 64, TINY)
    with refused("a tensor has 0 elements: kernels take 1 to"):
        quantize_nf4(torch.ones(0), th, order, 64, TINY)
    with refused(f"a tensor has {MAX_NUMEL} elements"):
        check_numel(MAX_NUMEL)
    with refused("15 thresholds and 15 codes do not match"):
        quantize_nf4(torch.ones(9), th, order[:-1], 64, TINY)
    with refused(r"thresholds has shape \(9,\): it must be flat, with 255 entries"):
        double_quantize(torch.ones(9), torch.ones(()), torch.ones(9), 256, TINY)
    with refused(r"thresholds has shape \(255,\), not contiguous"):
        double_quantize(torch.ones(9), torch.ones(()), torch.ones(510)[::2], 256, TINY)
    with refused(r"absmax_offset has shape \(0,\): it must be one number"):
        double_quantize(torch.ones(9), torch.ones(0), torch.ones(255), 256, TINY)
    for group in (0, -256, 100):
        with refused(f"group={group} is not allowed: kernels take a power of two"):
            double_quantize(torch.ones(9), torch.ones(()), torch.ones(255), group, TINY)
    constants = weight().plain.constants
    with refused(r"absmax_offset has shape \(0,\)"):
        dequantize_double(packed, constants._replace(offset=torch.empty(0)), levels, 32, out)
    with refused("group=-256 is not allowed"):
        dequantize_double(packed, constants._replace(group=-256), levels, 32, out)


def test_products_refuse_what_does_not_match():
    q = weight()
    x = torch.ones(3, COLUMNS, dtype=bf16)
    with refused("x has 9 tokens: gemv_nf4 takes at most 8"):
        gemv_nf4(torch.ones(9, COLUMNS), q.plain, ROWS)
    with refused("a row of 40 columns is not whole blocks of 32"):
        gemv_nf4(torch.ones(1, 40), q.plain, ROWS)
    with refused("packed has shape .*: it must be flat, with 224 entries"):
        gemv_nf4(x, q.plain, ROWS + 1)
    with refused("packed has shape .*: it must be flat, with 96 entries"):
        gemv_nf4(x[:, :32], q.plain, ROWS)
    with refused("x has shape .*: it must be a matrix"):
        gemv_nf4(x[0], q.plain, ROWS)
    with refused("x is float32: it must be bfloat16, float16"):
        matmul_nf4(x.float(), q.plain, ROWS)
    with refused("only one of lora_A and lora_B is given"):
        matmul_nf4(x, q.plain, ROWS, lora_A=x)
    with refused(r"lora_B has shape \(2, 3\): it must be \(6, 3\)"):
        matmul_nf4(x, q.plain, ROWS, torch.ones(3, COLUMNS, dtype=bf16), torch.ones(2, 3, dtype=bf16))


def test_adamw_refuses_what_does_not_match():
    p, c, s = torch.ones(300), torch.zeros(300, dtype=torch.uint8), torch.zeros(2)
    tables = (torch.ones(256), torch.ones(255)) * 2
    with refused("scale2 has shape .*: it must be flat, with 2 entries"):
        adamw_8bit(p, p, c, s, c, s[:1], tables, (0.9,) * 6, TINY)
    with refused(r"table 4 has shape \(1,\): it must be flat, with 255 entries"):
        adamw_8bit(p, p, c, s, c, s, (*tables[:3], s[:1]), (0.9,) * 6, TINY)
    with refused("table 1 is int64: it must be float32"):
        adamw_8bit(p, p, c, s, c, s, (tables[0].long(), *tables[1:]), (0.9,) * 6, TINY)
    with refused("5 scalars are given: a step takes beta1"):
        adamw_8bit(p, p, c, s, c, s, tables, (0.9,) * 5, TINY)


def test_tensors_of_another_device_are_refused(monkeypatch):
    q, out = weight(double=False), torch.empty(ROWS * COLUMNS)
    with refused("packed on cpu, .*, absmax on meta: the tensors of one launch lie on one device"):
        dequantize_nf4(q.packed, q.constants.to("meta"), q.levels, 32, out)
    with refused("weight is on meta: Triton needs cpu here, because TRITON_INTERPRET is set"):
        quantize_nf4(*(t.to("meta") for t in (torch.ones(9), *rounding(q.levels))), 64, TINY)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with refused("packed is on cpu: Triton needs cuda here, or TRITON_INTERPRET=1 from the start"):
        dequantize_nf4(q.packed, q.constants, q.levels, 32, out)
