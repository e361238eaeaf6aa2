"""Four faults of Triton's interpreter, mended while TRITON_INTERPRET=1: kernels stay as a GPU runs them.

Triton 3.7 cuts float32 to bf16 off instead of rounding to nearest even, as every GPU does; it reads bf16 denormals
wrongly; and it multiplies the bit patterns of bf16 matrices as if they were whole numbers. test_interpreter.py tells
when it no longer does. Triton 3.6 cannot loop over a number that a kernel was given, with NumPy from 2.5 on.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as of_triton
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
_patch_tensor = of_triton._patch_lang_tensor


def _to_float32(handle: TensorHandle) -> np.ndarray:
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data.astype(np.float32)
    return (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _cast_rightly(self, source: TensorHandle, to: tl.dtype) -> TensorHandle:
    if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy().reshape(source.data.shape), tl.bfloat16)
    if source.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
        return TensorHandle(_to_float32(source), tl.float32)
    return _cast(self, source, to)


def _dot_of_floats(self, a, b, d, input_precision, max_num_imprecise_acc):
    if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
        return _dot(self, a, b, d, input_precision, max_num_imprecise_acc)
    product = np.matmul(_to_float32(a), _to_float32(b), dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _patch_with_index(tensor, *scope) -> None:
    _patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: self.handle.data.astype(np.int64).item()  # (1,) is no scalar for int()


def mend() -> None:
    InterpreterBuilder.cast_impl = _cast_rightly
    InterpreterBuilder.create_fp_to_fp = lambda self, source, to, rounding: _cast_rightly(self, source, to)
    InterpreterBuilder.create_dot = _dot_of_floats
    of_triton._patch_lang_tensor = _patch_with_index
