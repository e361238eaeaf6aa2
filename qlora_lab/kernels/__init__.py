"""The kernels room: fast twins of the quant room's functions, and which one runs.

A twin takes plain tensors and tables, returns what the readable function returns, and is tested to give the same bits,
or the same result within a derived bound. You can skip this room and still understand QLoRA. It imports nothing else of
the library.

Set the environment variable QLORA_LAB_KERNELS=reference to run the readable functions everywhere.
"""

import os
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

OVERRIDE = "QLORA_LAB_KERNELS"


class Choice(NamedTuple):
    """Which implementation runs, and why. Without modules the readable functions run."""

    name: str
    why: str
    blocks: ModuleType | None = None  # has takes, quantize_blocks and dequantize_blocks
    product: ModuleType | None = None  # forward and backward of a linear layer
    adamw: ModuleType | None = None  # adamw_8bit


def choose(device: str = "cpu") -> Choice:
    """Choose the implementation for a device such as "cpu" or "cuda". Raises ValueError for an unknown override."""
    return _choose(device, os.environ[OVERRIDE] if OVERRIDE in os.environ else "")  # noqa: SIM401 - twice as fast


def blocks_for(device: str, n_levels: int, block_size: int) -> ModuleType | None:
    """Return the kernels on blocks for these levels and blocks, or None: then the readable functions run."""
    module = choose(device).blocks  # cpu.py, or triton/dispatch.py
    return module if module and module.takes(n_levels, block_size) else None


def product_for(device: str, n_levels: int, block_size: int) -> ModuleType | None:
    """The same for products."""
    chosen = choose(device)
    return chosen.product if chosen.product and chosen.blocks.takes(n_levels, block_size) else None


# A compiled model keeps its kernels. torch.compiler.assume_constant_result sets this, but imports the compiler, 0.9 s.
product_for._dynamo_marked_constant = True


@lru_cache
def _choose(device: str, override: str) -> Choice:
    if override not in ("", "reference"):
        raise ValueError(f"{OVERRIDE}={override!r} is not known: leave it unset, or set it to 'reference'")
    if override:
        return Choice("reference", f"{OVERRIDE} asks for it")
    if device == "cuda":
        if find_spec("triton") is None:
            return Choice("reference", "Triton is not installed: it exists for Linux")
        from qlora_lab.kernels import triton

        if why := triton.refusal():
            return Choice("reference", why)
        from qlora_lab.kernels.triton import adamw_8bit, dispatch

        return Choice("triton", "the device is a GPU", dispatch, dispatch, adamw_8bit)
    if device != "cpu":
        return Choice("reference", f"there is no kernel for {device}")
    if _forked:
        return Choice("reference", "a forked process cannot use its parent's threads")
    from qlora_lab.kernels import adamw, cpu, product

    look_up = "with 16 look-ups at once" if cpu.FAST else "with plain loops: no AVX2 or AVX-512 here"
    return Choice("cpu", look_up, cpu, product, adamw)


_forked = False


def _in_child() -> None:
    global _forked
    _forked = True
    _choose.cache_clear()  # the parent's choice is not the child's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
