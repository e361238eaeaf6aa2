"""A quantised tensor as named plain tensors, and back, with bitsandbytes' key names, so that both read the files.

In: a QuantizedTensor and its key, such as "model.layers.0.mlp.up_proj.weight". Out: a dict of tensors for safetensors:
    KEY                                    uint8 (n_bytes, 1)        packed codes
    KEY.absmax                             float32, or uint8 codes   (n_blocks,)
    KEY.quant_map                          float32 (2^bits,)         levels
    KEY.nested_absmax, KEY.nested_quant_map                          only with double quantization
    KEY.quant_state.bitsandbytes__nf4      uint8                     JSON: block size, shape, dtype, offset
Source: bitsandbytes 0.50, QuantState.as_dict. It reads nf4 and fp4 only, so other codebooks carry `qlora_lab__NAME` in
the last key: bitsandbytes then refuses them instead of misreading them. The table itself is always stored, so one made
by hand comes back too, as `custom`.
"""

import json
import math
from collections.abc import Mapping
from reprlib import repr as short

import torch

from qlora_lab.files.strict_json import decoded, parse
from qlora_lab.files.tensor_header import BEYOND, MOST_SIZES
from qlora_lab.quant.blocks import check_block_size
from qlora_lab.quant.codebook import CODEBOOKS, CUSTOM, bits_of, check_levels, codebook
from qlora_lab.quant.double_quant import GROUP_SIZE, DoubleQuantized, dynamic_map
from qlora_lab.quant.finite import first_not_finite, largest_magnitude
from qlora_lab.quant.packing import group_of
from qlora_lab.quant.quantize import WEIGHT_DTYPES, QuantizedTensor

BITSANDBYTES_READS = ("nf4", "fp4")  # by the type in the last key
BITSANDBYTES_SMALLEST = 32  # weights in a block; its kernels know 32 to 4096
# bnb_4bit_quant_storage lets bytes of codes pose as another dtype, for FSDP
STORAGE_DTYPES = (torch.uint8, torch.int8, *WEIGHT_DTYPES, torch.float64)
MOST_STATE = 2**12  # bytes of a description; real ones have about 250
LARGEST = torch.finfo(torch.float32).max  # sums beyond it become infinity
AGAIN = "quantise its original again"
_KNOWN = {"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"}
_DTYPES = {str(d).removeprefix("torch."): d for d in WEIGHT_DTYPES}


def to_tensors(q: QuantizedTensor, key: str) -> dict[str, torch.Tensor]:
    """Return the tensors of `q` under bitsandbytes' names (module docstring). They share memory with `q`."""
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


def from_tensors(tensors: Mapping[str, torch.Tensor], key: str) -> QuantizedTensor:
    """Read the tensor named `key` from a dict with bitsandbytes' names, written by either library.

    Raises KeyError for a missing part, and ValueError, which names the part, if its kind, size or values are wrong.
    Constants must be finite, so tensors of quantize(keep_non_finite=True) may be refused.
    """
    if not isinstance(tensors, Mapping) or not isinstance(key, str):
        kinds = f"{type(tensors).__name__} and {type(key).__name__}"
        raise ValueError(f"{kinds} are given: give a dict of tensors and the key of one")
    state = read_state(tensors, key)
    packed = _part(tensors, key, STORAGE_DTYPES).view(torch.uint8)
    levels = read_levels(tensors, key, state["quant_type"], packed.device)
    nested = "nested_offset" in state  # double quantization
    absmax = _part(tensors, f"{key}.absmax", (torch.uint8,) if nested else WEIGHT_DTYPES, packed.device)
    _check_sizes(tensors, key, state, len(packed), len(absmax), bits_of(levels))
    constants = read_nested(tensors, key, state, absmax) if nested else not_negative(absmax, f"{key}.absmax")
    q = QuantizedTensor(
        packed=packed,
        constants=constants,
        levels=levels,
        codebook=state["quant_type"],
        block_size=state["blocksize"],
        shape=torch.Size(state["shape"]),
        dtype=_DTYPES[state["dtype"]],
    )
    if len(levels) < 2**q.bits and (highest := int(q.codes.max())) >= len(levels):
        raise ValueError(f"{key} holds code {highest}, but {key}.quant_map has {len(levels)} levels: {AGAIN}")
    return q


def read_state(tensors: Mapping[str, torch.Tensor], key: str) -> dict:
    prefix = f"{key}.quant_state."
    names = [name for name in tensors if isinstance(name, str) and name.startswith(prefix)]
    if len(names) != 1:
        raise KeyError(
            f"{key}: expected one key that starts with {prefix!r}, found {short(names) if names else 'none'}"
        )
    state = parsed_state(_part(tensors, names[0], (torch.uint8,)))
    if state is None:
        raise ValueError(f"{names[0]} cannot be read: the checkpoint is damaged")
    if unknown := sorted(state.keys() - _KNOWN):
        name = unknown[0]
        value = short(state[name])
        raise ValueError(f"{key} is stored with {name}={value}, which is not known here: quantise its original")
    if state["quant_type"] not in (*CODEBOOKS, CUSTOM) or state["dtype"] not in _DTYPES:
        raise ValueError(
            f"{key} is stored as {short(state['quant_type'])} of {short(state['dtype'])}, which is not known here: "
            f"data types are {', '.join(CODEBOOKS)}, weights {', '.join(_DTYPES)}"
        )
    if names[0].rpartition("__")[2] != state["quant_type"]:
        raise ValueError(f"{names[0]} describes {state['quant_type']}, another type than its name: {AGAIN}")
    try:
        check_block_size(state["blocksize"])
    except ValueError as error:
        raise ValueError(f"{key} is stored with {error}") from None
    return state


def stored_as(tensors: Mapping[str, torch.Tensor], key: str) -> tuple[str, int, bool]:
    """Return (codebook, block size, double quantization) of a stored tensor. Raises KeyError and ValueError."""
    state = read_state(tensors, key)
    return state["quant_type"], state["blocksize"], "nested_offset" in state


def parsed_state(encoded: torch.Tensor) -> dict | None:
    """Parse what bitsandbytes writes, a JSON object with numbers in their places; None for anything else."""
    if len(encoded) > MOST_STATE:
        return None
    try:
        state = parse(decoded(bytes(encoded.tolist()), "state"), "state")
        whole = [*state["shape"], state["blocksize"]]
        numbers = [*whole, state.get("nested_offset", 0)]
        float(numbers[-1])  # an integer of 400 digits is not a float
        named = state["quant_type"], state["dtype"]  # two texts
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return None
    right = isinstance(state["shape"], list) and len(state["shape"]) <= MOST_SIZES
    right = right and all(type(n) is int and n > 0 for n in whole) and all(n < BEYOND for n in state["shape"])
    right = right and all(type(n) in (int, float) for n in numbers)
    return state if right and all(isinstance(name, str) for name in named) else None


def _part(
    tensors: Mapping[str, torch.Tensor], name: str, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None
) -> torch.Tensor:
    """Return the part `name` as (numel,), contiguous. Raises KeyError if it is missing, ValueError for a wrong kind."""
    if name not in tensors:
        raise KeyError(f"{name} is missing: the checkpoint is incomplete")
    part = tensors[name]
    if not isinstance(part, torch.Tensor) or part.layout != torch.strided or part.is_meta:
        kind = f"a {part.layout} tensor on {part.device}" if isinstance(part, torch.Tensor) else type(part).__name__
        raise ValueError(f"{name} is {kind}, but a plain tensor with values is needed: {AGAIN}")
    if part.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {part.dtype}, but {allowed} is needed there: {AGAIN}")
    if device not in (None, part.device):
        raise ValueError(f"{name} is on {part.device}, but its codes on {device}: move all parts to one device")
    if part.nbytes > part.untyped_storage().nbytes():
        raise ValueError(f"{name} is an expanded view, {part.nbytes:,} bytes that are not there: {AGAIN}")
    flat = part.detach().reshape(-1).contiguous()
    return flat if flat.stride() == (1,) else flat.clone(memory_format=torch.contiguous_format)  # one element


def read_levels(tensors: Mapping[str, torch.Tensor], key: str, name: str, device: torch.device) -> torch.Tensor:
    """Return the table of the codes. Raises ValueError for a bad table, or one that differs from its name's."""
    dtypes = WEIGHT_DTYPES if name == CUSTOM else (torch.float32,)
    flat = _part(tensors, f"{key}.quant_map", dtypes, device)
    stored = tensors[f"{key}.quant_map"]
    if name == CUSTOM:  # only the stored table says what the codes mean
        try:
            return check_levels(stored).to(flat.device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key}.quant_map: {error}") from None
    levels = codebook(name)
    if stored.shape != levels.shape or not torch.allclose(flat.cpu(), levels):
        raise ValueError(f"{key}.quant_map is not the table of {name}: {AGAIN}")
    return flat


def read_nested(tensors: Mapping[str, torch.Tensor], key: str, state: dict, codes: torch.Tensor) -> DoubleQuantized:
    """Return the constants of constants. Raises KeyError or ValueError for impossible ones."""
    if (size := state.get("nested_blocksize")) != GROUP_SIZE:
        raise ValueError(f"{key} groups constants by {short(size)}, but only {GROUP_SIZE} is known")
    if (dtype := state.get("nested_dtype", "float32")) != "float32":
        raise ValueError(f"{key} has nested_dtype={short(dtype)}, but only float32 is known: {AGAIN}")
    if (name := f"{key}.nested_quant_map") in tensors:
        table = _part(tensors, name, (torch.float32,)).cpu()
        if not torch.equal(table, dynamic_map()):
            raise ValueError(f"{name} is another table than bitsandbytes' dynamic map: it cannot be read")
    scale = _part(tensors, f"{key}.nested_absmax", WEIGHT_DTYPES, codes.device)
    offset = state["nested_offset"]  # a Python float
    if not offset + largest_magnitude(scale) <= LARGEST:  # false for NaN; they scale every weight
        raise ValueError(f"{key} has NaN or infinity in its nested constants: {AGAIN}")
    if offset < 0:
        raise ValueError(f"{key} has nested_offset={offset:g}, but it is a mean of magnitudes: {AGAIN}")
    offset = torch.tensor(offset, dtype=torch.float32, device=codes.device)
    return DoubleQuantized(codes, not_negative(scale, f"{key}.nested_absmax"), offset)


def not_negative(constants: torch.Tensor, name: str) -> torch.Tensor:
    """Return `constants` as float32. Raises ValueError unless each can be the largest magnitude of a block."""
    if fault := first_not_finite(constants):
        raise ValueError(f"{name} holds {fault}, but the constant of a block is finite: {AGAIN}")
    if len(constants) and constants.min() < 0:
        raise ValueError(f"{name} holds {constants.min():g}, but the constant of a block is at least 0: {AGAIN}")
    return constants.float()


def part_sizes(state: Mapping, key: str, bits: int) -> dict[str, int]:
    """Return how many entries each part of a tensor must have: packed bytes, constants and scales of constants."""
    numel = math.prod(state["shape"])
    n_blocks = -(-numel // state["blocksize"])  # rounded up: the last block may be partial
    codes_of_group, bytes_of_group = group_of(bits)
    sizes = {key: -(-numel // codes_of_group) * bytes_of_group, f"{key}.absmax": n_blocks}
    nested = {f"{key}.nested_absmax": -(-n_blocks // GROUP_SIZE)} if "nested_offset" in state else {}
    return sizes | nested


def wrong_size(name: str, have: int, want: int, shape: list[int]) -> str:
    return f"{name} has {have} entries, but shape {short(tuple(shape))} needs {short(want)}"


def _check_sizes(
    tensors: Mapping[str, torch.Tensor], key: str, state: dict, n_bytes: int, n_constants: int, bits: int
) -> None:
    """Raise ValueError unless codes and constants fit the shape. Python's integers do not overflow here."""
    found = {key: n_bytes, f"{key}.absmax": n_constants}
    for name, want in part_sizes(state, key, bits).items():
        have = found[name] if name in found else len(_part(tensors, name, WEIGHT_DTYPES))
        if have != want:
            raise ValueError(wrong_size(name, have, want, state["shape"]))
