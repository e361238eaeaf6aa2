"""Whether the tensors of a checkpoint are those of the run that goes on: names, shapes, dtypes, and finite values.

In: a checkpoint's tensors by name, the adapter and the parameters of the run, the bits of its moments. Out: nothing, or
a ValueError that names the tensor. Checksums say that a file is what was written; this, that what was written is ours.
Not here: settings and data, which are compared as text (run_record.py).
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from qlora_lab.optim.adamw_8bit import BLOCK
from qlora_lab.quant.finite import first_not_finite

Kind = tuple[tuple[int, ...], torch.dtype]


def check_tensors(
    file: Path,
    tensors: dict[str, torch.Tensor],
    adapter: dict[str, torch.Tensor],
    parameters: Sequence[torch.Tensor],
    bits: int,
) -> None:
    """Raise ValueError for the first of `tensors` that cannot be the state of this run.

    adapter: lora_A and lora_B by PEFT's keys. parameters: in the optimizer's order; one that never had a gradient has
    no state.
    """
    wanted = {f"adapter.{key}": (tuple(tensor.shape), torch.float32) for key, tensor in adapter.items()}
    for number, parameter in enumerate(parameters):
        kinds = _moments(parameter, bits)
        if any(f"optimizer.{number}.{name}" in tensors for name in kinds):
            wanted |= {f"optimizer.{number}.{name}": kind for name, kind in kinds.items()}
    for name in sorted(wanted.keys() ^ tensors.keys()):
        fault = "is missing" if name in wanted else "is not part of this run"
        raise ValueError(f"{file}: {name} {fault}: resume from another checkpoint")
    for name, kind in wanted.items():
        if fault := _fault(tensors[name], kind):
            raise ValueError(f"{file}: {name} {fault}: resume from another checkpoint")


def _moments(parameter: torch.Tensor, bits: int) -> dict[str, Kind]:
    """What the optimizer keeps for a parameter, by the names of torch's AdamW, or of bitsandbytes' in 8 bits."""
    shape, scales = tuple(parameter.shape), (-(-parameter.numel() // BLOCK),)
    step = {"step": ((), torch.float32)}
    if bits == 32:
        return step | dict.fromkeys(("exp_avg", "exp_avg_sq"), (shape, torch.float32))
    codes = dict.fromkeys(("state1", "state2"), (shape, torch.uint8))
    return step | codes | dict.fromkeys(("absmax1", "absmax2"), (scales, torch.float32))


def _fault(tensor: torch.Tensor, kind: Kind) -> str | None:
    shape, dtype = kind
    if tensor.shape != shape or tensor.dtype != dtype:
        return f"is {tensor.dtype} of shape {tuple(tensor.shape)}, but the run has {dtype} of shape {shape}"
    fault = first_not_finite(tensor) if dtype.is_floating_point else None
    return fault and f"holds {fault}"
