"""The interpreter computes as a GPU does: the faults that interpreter.py mends, and that they are still there."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from qlora_lab.kernels.triton import interpreter


@triton.jit
def _round_kernel(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at, mask=at < n).to(tl.bfloat16), mask=at < n)


@triton.jit
def _dot_kernel(a, b, out):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _widen_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(tl.float32))


def rounded() -> tuple[torch.Tensor, torch.Tensor]:
    odd = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-7, -3e38, torch.inf, torch.nan, 1e-40, 3.3961776e38])
    out = torch.empty(8, dtype=torch.bfloat16)
    _round_kernel[(1,)](odd, out, 8, 8)
    return out, odd.bfloat16()


def widened() -> tuple[torch.Tensor, torch.Tensor]:
    given = torch.tensor([1e-40, -3e-39, 1.5, 0.0]).bfloat16()
    out = torch.empty(4)
    _widen_kernel[(1,)](given, out, 4)
    return out, given.float()


def multiplied() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=g).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out)
    return out, a.float() @ b.float()


def test_bf16_is_rounded_to_nearest_even():
    got, want = rounded()
    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7)) and got[5].isnan()


def test_bf16_denormals_are_read():
    got, want = widened()
    assert torch.equal(got, want)


def test_bf16_matrices_are_multiplied_as_numbers():
    got, want = multiplied()
    assert torch.allclose(got, want, atol=1e-5)


def test_a_number_that_a_kernel_was_given_bounds_a_loop(monkeypatch):
    """Triton 3.6 makes an int of the array, which NumPy from 2.5 on refuses unless it has no dimension."""

    class Tensor:
        handle = SimpleNamespace(data=np.array([7], dtype=np.int32))

    monkeypatch.setattr(interpreter, "_patch_tensor", lambda tensor: None)  # that of any version
    interpreter.of_triton._patch_lang_tensor(Tensor)
    assert range(Tensor()) == range(7)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton_still_needs_the_repair(monkeypatch):
    """Where this fails, interpreter.py can go."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", interpreter._cast)
    got, want = rounded()
    assert not torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    got, want = widened()
    assert not torch.equal(got, want)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", interpreter._dot)
    got, want = multiplied()
    assert not torch.allclose(got, want, atol=1e-1)
