"""Several matrices of one shape, quantised one by one and kept together, as the experts of a mixture lie in a model.

In: (n, rows, columns). Out: a QuantizedStack, whose member i is quantize(weight[i]), bit for bit: no block and no group
of constants reaches from one expert into the next, so one is decoded without the others.
In files: the parts of all members, one tensor for each part (n times fewer names than one by one),

    KEY                 uint8 (n, n_bytes)
    KEY.absmax          (n, n_blocks)
    KEY.nested_absmax   (n, n_groups), and KEY.nested_offset (n,), only with double quantization
    KEY.quant_map       float32 (2^bits,), and KEY.nested_quant_map (256,)
    KEY.stack_state     uint8, JSON: what quant_state holds, with the shape of the stack

The key is not bitsandbytes' quant_state: it knows no stacks, and would take one for a matrix.
"""

import json
from collections.abc import Mapping
from functools import cached_property

import torch

from qlora_lab.quant.double_quant import DoubleQuantized
from qlora_lab.quant.quantize import Quantized, QuantizedTensor, dequantize, quantize
from qlora_lab.quant.serialize import AGAIN, from_tensors, parsed_state, stored_as as matrix_stored_as, to_tensors

STATE = "stack_state"
PARTS = ("absmax", "nested_absmax", "nested_offset")  # of each member; tables are shared
_OF_MEMBER = "quant_state.qlora_lab__"  # the key under which serialize.py reads a member's description


class QuantizedStack(Quantized):
    """Quantised matrices of one shape, (n, rows, columns). packed: (n, n_bytes); constants: (n, n_blocks)."""

    @property
    def absmax(self) -> torch.Tensor:
        """Block constants, (n, n_blocks) float32, with double quantization undone."""
        # By members: groups of 256 constants begin anew in each.
        return torch.stack([member.absmax for member in self.members])

    @cached_property
    def members(self) -> tuple[QuantizedTensor, ...]:
        """The matrices, as views; made once, because kernels cache in them."""
        return tuple(self._member(i) for i in range(len(self)))

    def _member(self, i: int) -> QuantizedTensor:
        constants = self.constants
        if self.double_quant:
            constants = DoubleQuantized(*(part[i] for part in vars(constants).values()))
        else:
            constants = constants[i]
        rest = self.levels, self.codebook, self.block_size, self.shape[1:], self.dtype
        return QuantizedTensor(self.packed[i], constants, *rest)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> QuantizedTensor:
        return self.members[i]


def quantize_stack(
    weight: torch.Tensor,
    codebook: str | torch.Tensor = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
    *,
    name: str = "weight",
) -> QuantizedStack:
    """Quantise `weight`, (n, rows, columns), matrix by matrix: temporaries are those of one. Arguments as in quantize.

    Raises ValueError for another number of dimensions, and whatever quantize raises, with the member's number.

    >>> quantize_stack(torch.ones(3, 2, 64))[1].shape
    torch.Size([2, 64])
    """
    if weight.dim() != 3:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, but a stack needs (matrices, rows, columns)")
    options = codebook, block_size, double_quant
    return stacked([quantize(matrix, *options, name=f"{name}[{i}]") for i, matrix in enumerate(weight)])


def stacked(members: list[QuantizedTensor]) -> QuantizedStack:
    """Put matrices of one shape and of the same options together, in one copy of each part."""
    first = members[0]
    # The packed bytes are there twice for a moment, a quarter of the 16-bit weight each.
    if first.double_quant:
        parts = zip(*(vars(member.constants).values() for member in members), strict=True)
        constants = DoubleQuantized(*map(torch.stack, map(list, parts)))
    else:
        constants = torch.stack([member.constants for member in members])
    shape = torch.Size([len(members), *first.shape])
    packed = torch.stack([member.packed for member in members])
    return QuantizedStack(packed, constants, first.levels, first.codebook, first.block_size, shape, first.dtype)


def dequantize_stack(
    q: QuantizedStack, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what `q` stands for, (n, rows, columns), as dequantize does, matrix by matrix."""
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device) if out is None else out
    # Into one tensor at once: a list of decoded matrices would be a second copy.
    for member, values in zip(q.members, out, strict=True):
        dequantize(member, out=values)
    return out


def stack_to_tensors(q: QuantizedStack, key: str) -> dict[str, torch.Tensor]:
    """Return the tensors of `q` under the names of the module docstring. They share memory with `q`."""
    described = to_tensors(q[0], key)  # tables, and what is the same for all members
    state = parsed_state(next(tensor for name, tensor in described.items() if ".quant_state." in name))
    state["shape"] = list(q.shape)
    state.pop("nested_offset", None)  # each member has its own
    tensors = {name: tensor for name, tensor in described.items() if name.endswith("quant_map")}
    tensors |= {key: q.packed, f"{key}.{STATE}": _encoded(state)}
    if q.double_quant:
        return tensors | {f"{key}.{name}": part for name, part in zip(PARTS, vars(q.constants).values(), strict=True)}
    return tensors | {f"{key}.absmax": q.constants}


def stack_from_tensors(tensors: Mapping[str, torch.Tensor], key: str) -> QuantizedStack:
    """Read the stack called `key`; on the CPU its parts are `tensors`, not copies.

    Each member is checked as from_tensors checks a matrix, and errors are those of from_tensors.
    """
    state = parsed_state(tensors[f"{key}.{STATE}"].reshape(-1)) if f"{key}.{STATE}" in tensors else None
    if state is None or len(state["shape"]) != 3:
        raise ValueError(f"{key}.{STATE} cannot be read: {AGAIN}")
    n = state["shape"][0]  # may be absurd: compared with what is there before anything is made of it
    parts = {name: tensors[f"{key}.{name}"] for name in PARTS if f"{key}.{name}" in tensors}
    if key not in tensors:
        raise KeyError(f"{key} is missing: the checkpoint is incomplete")
    parts[""] = tensors[key]
    for name, part in parts.items():
        if part.dim() != (1 if name == "nested_offset" else 2) or len(part) != n:
            raise ValueError(f"{_named(key, name)} has shape {tuple(part.shape)}, but there are {n} matrices: {AGAIN}")
        # Members are views of these very tensors, so no part may need a cast, as those of bitsandbytes may.
        wanted = torch.uint8 if name == "" or (name == "absmax" and "nested_offset" in parts) else torch.float32
        if part.dtype != wanted:
            raise ValueError(f"{_named(key, name)} is {part.dtype}, but {wanted} is needed there: {AGAIN}")
    if "nested_offset" in parts and not parts["nested_offset"].isfinite().all():
        # The next check would look for it in a description, where a matrix has it.
        raise ValueError(f"{key}.nested_offset has NaN or infinity, but a mean of magnitudes is finite: {AGAIN}")
    tables = {name: tensors[name] for name in (f"{key}.quant_map", f"{key}.nested_quant_map") if name in tensors}
    members = [from_tensors(tables | _member_tensors(parts, state, key, i), key) for i in range(n)]
    first = members[0]
    constants = parts["absmax"]
    if first.double_quant:
        constants = DoubleQuantized(constants, parts["nested_absmax"], parts["nested_offset"])
    rest = first.levels, first.codebook, first.block_size, torch.Size(state["shape"]), first.dtype
    return QuantizedStack(parts[""], constants, *rest)


def stored_as(tensors: Mapping[str, torch.Tensor], key: str) -> tuple[str, int, bool]:
    """Return (codebook, block size, double quantization) of a stored matrix or stack, as serialize.stored_as does."""
    if f"{key}.{STATE}" not in tensors:
        return matrix_stored_as(tensors, key)
    state = parsed_state(tensors[f"{key}.{STATE}"])
    return state["quant_type"], state["blocksize"], f"{key}.nested_offset" in tensors


def _member_tensors(parts: dict[str, torch.Tensor], state: dict, key: str, i: int) -> dict[str, torch.Tensor]:
    """Return what serialize.py reads as matrix i."""
    # So all checks of serialize.py hold. Reading 768 matrices with them took 0.2 s.
    own = state | {"shape": state["shape"][1:]}
    if "nested_offset" in parts:
        own["nested_offset"] = parts["nested_offset"][i].item()
    tensors = {_named(key, name): part[i] for name, part in parts.items() if name != "nested_offset"}
    return tensors | {f"{key}.{_OF_MEMBER}{state['quant_type']}": _encoded(own)}


def _named(key: str, part: str) -> str:
    return f"{key}.{part}" if part else key  # the codes have the key itself


def _encoded(state: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
