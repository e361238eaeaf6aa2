"""A quantised tensor as named plain tensors, and back: bitsandbytes' own key names, so that checkpoints are shared.

In: a QuantizedTensor and its key, such as "model.layers.0.mlp.up_proj.weight". Out: a dict of tensors for safetensors:
    KEY                                    uint8 (n_bytes, 1)        packed codes
    KEY.absmax                             float32, or uint8 codes   (n_blocks,)
    KEY.quant_map                          float32 (2^bits,)         levels
    KEY.nested_absmax, KEY.nested_quant_map                          only with double quantization
    KEY.quant_state.bitsandbytes__nf4      uint8                     JSON: block size, shape, dtype, offset
Source: bitsandbytes 0.50, QuantState.as_dict. Codebooks it does not know (all but nf4 and fp4) carry `qlora_lab__NAME`
in the last key, so that it refuses them instead of misreading them. The table itself is always stored, so one made by
hand comes back too, as `custom`.

Not here: files (finetune/peft_format.py).
"""

import json

import torch

from qlora_lab.quant.blocks import check_block_size
from qlora_lab.quant.codebook import CODEBOOKS, CUSTOM, check_levels, codebook
from qlora_lab.quant.double_quant import GROUP_SIZE, DoubleQuantized, dynamic_map
from qlora_lab.quant.packing import group_of
from qlora_lab.quant.quantize import WEIGHT_DTYPES, QuantizedTensor
from qlora_lab.quant.strict_json import decoded, parse

BITSANDBYTES_READS = ("nf4", "fp4")
_KNOWN = {"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"}
_DTYPES = {str(d).removeprefix("torch."): d for d in WEIGHT_DTYPES}


def to_tensors(q: QuantizedTensor, key: str) -> dict[str, torch.Tensor]:
    """The tensors that stand for `q`, by bitsandbytes' names (module docstring). Shares memory with `q`."""
    state = {
        "quant_type": q.codebook,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    tensors = {key: q.packed[:, None], f"{key}.quant_map": q.levels}
    if q.double_quant:
        nested = q.constants
        tensors |= {
            f"{key}.absmax": nested.absmax_codes,
            f"{key}.nested_absmax": nested.absmax_scale,
            f"{key}.nested_quant_map": dynamic_map().to(q.device),
        }
        offset = nested.absmax_offset.item()  # a float32 passes through JSON unchanged
        state |= {"nested_blocksize": GROUP_SIZE, "nested_dtype": "float32", "nested_offset": offset}
    else:
        tensors[f"{key}.absmax"] = q.constants
    owner = "bitsandbytes" if q.codebook in BITSANDBYTES_READS else "qlora_lab"
    encoded = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors | {f"{key}.quant_state.{owner}__{q.codebook}": encoded}


def from_tensors(tensors: dict[str, torch.Tensor], key: str) -> QuantizedTensor:
    """Read the tensor named `key` out of a dict with bitsandbytes' names, whoever wrote it.

    Raises KeyError for a missing part and ValueError for one of the wrong size, each by its name.
    """
    state = _read_state(tensors, key)
    absmax = _part(tensors, f"{key}.absmax")
    nested = "nested_offset" in state
    if nested != (absmax.dtype == torch.uint8) or not (nested or absmax.is_floating_point()):
        raise ValueError(f"{key}.absmax is {absmax.dtype}, but constants are torch.uint8 if, and only if, nested")
    absmax = absmax.reshape(-1).contiguous() if nested else absmax.reshape(-1).float().contiguous()
    if nested:
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=absmax.device)
        if not torch.equal(tensors.get(f"{key}.nested_quant_map", dynamic_map()).cpu(), dynamic_map()):
            raise ValueError(
                f"{key}.nested_quant_map is another table than bitsandbytes' dynamic map: it cannot be read"
            )
        if state.get("nested_blocksize") != GROUP_SIZE:
            size = state.get("nested_blocksize")
            raise ValueError(f"{key} groups constants by {size}, but only {GROUP_SIZE} is known")
        scale = _part(tensors, f"{key}.nested_absmax").reshape(-1).float().contiguous()
        if not (offset.isfinite() and scale.isfinite().all()):  # they scale every weight
            raise ValueError(f"{key} has NaN or infinity in its nested constants: quantise its original again")
        absmax = DoubleQuantized(absmax, scale, offset)
    packed = _part(tensors, key).reshape(-1).contiguous().view(torch.uint8)  # bitsandbytes: perhaps another dtype
    q = QuantizedTensor(
        packed=packed,
        constants=absmax,
        levels=_levels(tensors, key, state["quant_type"]),
        codebook=state["quant_type"],
        block_size=state["blocksize"],
        shape=torch.Size(state["shape"]),
        dtype=_DTYPES[state["dtype"]],
    )
    _check_sizes(q, key)
    return q


def _read_state(tensors: dict[str, torch.Tensor], key: str) -> dict:
    prefix = f"{key}.quant_state."
    found = [k for k in tensors if k.startswith(prefix)]
    if len(found) != 1:
        raise KeyError(f"{key}: expected one key that starts with {prefix!r}, found {found or 'none'}")
    state = _state(tensors[found[0]])
    if state is None:
        raise ValueError(f"{found[0]} cannot be read: the checkpoint is damaged")
    if unknown := sorted(state.keys() - _KNOWN):
        name = unknown[0]
        raise ValueError(f"{key} is stored with {name}={state[name]!r}, which is not known here: quantise its original")
    if state["quant_type"] not in (*CODEBOOKS, CUSTOM) or state["dtype"] not in _DTYPES:
        raise ValueError(
            f"{key} is stored as {state['quant_type']!r} of {state['dtype']!r}, which is not known here: "
            f"data types are {', '.join(CODEBOOKS)}, weights {', '.join(_DTYPES)}"
        )
    try:
        check_block_size(state["blocksize"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} is stored with {error}") from None
    return state


def _state(encoded: torch.Tensor) -> dict | None:
    """What bitsandbytes writes: a JSON object with numbers where numbers belong; None for anything else."""
    try:
        state = parse(decoded(bytes(encoded.tolist()), "state"), "state")
        whole = [*state["shape"], state["blocksize"]]
        numbers = [*whole, state.get("nested_offset", 0)]
        named = state["quant_type"], state["dtype"]
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    right = all(isinstance(n, int) and n > 0 for n in whole) and all(isinstance(n, (int, float)) for n in numbers)
    return state if right and all(isinstance(name, str) for name in named) else None


def _levels(tensors: dict[str, torch.Tensor], key: str, name: str) -> torch.Tensor:
    """The table of the codes. Raises ValueError for one that is none, or not the one of its name."""
    levels = _part(tensors, f"{key}.quant_map")
    if name == CUSTOM:  # nothing but its own table says what its codes mean
        try:
            check_levels(levels)
        except TypeError as error:
            raise ValueError(f"{key}.quant_map: {error}") from None
        return levels
    known = codebook(name)
    if levels.dtype != torch.float32 or levels.shape != known.shape or not torch.allclose(levels.cpu(), known):
        raise ValueError(f"{key}.quant_map is not the table of {name}: quantise its original again")
    return levels


def _part(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise KeyError(f"{name} is missing: the checkpoint is incomplete")
    return tensors[name]


def _check_sizes(q: QuantizedTensor, key: str) -> None:
    n_blocks = -(-q.numel // q.block_size)
    n_codes, n_bytes = group_of(q.bits)
    want = {key: -(-q.numel // n_codes) * n_bytes, f"{key}.absmax": n_blocks}
    have = {key: len(q.packed), f"{key}.absmax": len(q.constants.absmax_codes if q.double_quant else q.constants)}
    if q.double_quant:
        want[f"{key}.nested_absmax"] = -(-n_blocks // GROUP_SIZE)
        have[f"{key}.nested_absmax"] = len(q.constants.absmax_scale)
    for name, n in want.items():
        if have[name] != n:
            raise ValueError(f"{name} has {have[name]} entries, but shape {tuple(q.shape)} needs {n}")
