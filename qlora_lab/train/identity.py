"""What decides the bits of a run besides its settings and data: the base's weights, and how sums are computed.

A resume takes over what can be chosen (which routines multiply, how many threads). If the rest differs (versions,
processor) it is refused, because its last bits would differ from those of an uninterrupted run.
The checksum reads every frozen byte: SHA-256, one tensor in each thread. With the processor's own instructions for it a
core reads 1.7 GB/s: 0.13 s for the 106 MiB of SmolLM2-135M in 4 bits.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

from qlora_lab.kernels import choose, product
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.model.pair_attention import NAME as PAIRS
from qlora_lab.model.wide import NAME, TORCH, widen

VERSIONS = ("qlora-lab", "torch", "transformers", "numba")


def base_checksum(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and all bytes of everything that is not trained."""
    tensors = _base(model)
    # hashlib releases the interpreter lock, so threads hash side by side
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        digests = list(threads.map(_digest, tensors.values()))
    lines = [f"{name} {tuple(t.shape)} {t.dtype} {d}\n" for (name, t), d in zip(tensors.items(), digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _base(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> tensor: frozen parameters, stored buffers, and everything that packed weights are decoded from."""
    tensors = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for path, module in model.named_modules():
        stored = {n: b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set}
        tensors |= {f"{path}.{name}": buffer for name, buffer in stored.items()}
        if isinstance(module, PackedModule):
            weight = module.weight
            constants = weight.constants
            parts = {"packed": weight.packed, "levels": weight.levels}
            if weight.double_quant:
                parts |= {name: getattr(constants, name) for name in ("absmax_codes", "absmax_scale", "absmax_offset")}
            else:
                parts["absmax"] = constants
            tensors |= {f"{path}.{name} in blocks of {weight.block_size}": part for name, part in parts.items()}
    return tensors


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().reshape(-1).contiguous().cpu()
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()  # as bytes: numpy has no bfloat16


def arithmetic(model: nn.Module) -> dict:
    """What sums depend on: the outcome of the race of products, kernels, threads, processor and versions."""
    device = next(model.parameters()).device
    on_cpu = device.type == "cpu"
    return {
        "race": [_finite(seconds) for seconds in product.race()] if on_cpu else None,  # seconds; the fastest wins
        "attention": getattr(model.config, "_attn_implementation", None),
        "kernels": choose(device.type).name,
        "threads": torch.get_num_threads() if on_cpu else None,
        "processor": torch.backends.cpu.get_cpu_capability() if on_cpu else torch.cuda.get_device_name(device),
        "float32_products": torch.get_float32_matmul_precision(),
        "versions": {name: installed_version(name) for name in VERSIONS},
    }


def installed_version(name: str) -> str | None:
    """The version of a package; None for a clone that is on the path but not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None  # JSON has no infinity


def adopt_arithmetic(model: nn.Module, saved: dict) -> None:
    """Compute as the run began, even if this process's own race of products had another winner.

    Warns if this changes the number of threads.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    if saved.get("race"):
        product.keep(product.Race(*(math.inf if seconds is None else seconds for seconds in saved["race"])))
        # A model that was made without `load`, or by an earlier version, began with torch's attention, whichever dtype
        # won the race.
        own = model.config._attn_implementation
        if saved.get("attention") == TORCH and own == PAIRS:
            model.set_attn_implementation(TORCH)
        elif {NAME, PAIRS} & {saved.get("attention"), own}:
            widen(model)
    threads = saved.get("threads")
    own = torch.get_num_threads()
    if threads and threads != own and threads <= (os.cpu_count() or 1):  # more threads than cores: refused later
        torch.set_num_threads(threads)
        warnings.warn(f"the run began with {threads} threads, so it continues with {threads}, not {own}", stacklevel=2)


@contextmanager
def own_threads() -> Iterator[None]:
    """Give torch back its number of threads when the `with` block ends."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
