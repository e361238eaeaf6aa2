"""Count the bytes of a model's weights, those that it stores and those that one token uses, for any family.

    predicted_weights("mixtral", block_size=64) -> WeightLedger; measured_weights(model) -> the same of a loaded one

In: a name or folder (only its config.json is read), or a loaded model. A mixture of experts stores all of them, and a
token is routed to k of n: their codes are read, the others lie still.
Source: the structure of the empty model of transformers, as `load` sees it; nothing is known by a family's name but
where its configuration says k.
Not here: activations, adapters and moments, which predict.py knows for LLaMA-like models.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_lab.adapters.adapter import has_adapters
from qlora_lab.model.empty_model import dtypes_of, empty_model, stored_options
from qlora_lab.model.experts import is_stack, layout_of
from qlora_lab.model.fetch import resolve
from qlora_lab.model.language_model import as_names, beside, parts_beside
from qlora_lab.model.linear4bit import head_path, packable
from qlora_lab.model.load import check_options
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.model.quantised import options_of
from qlora_lab.model.stored import files_of
from qlora_lab.quant.codebook import bits_of, codebook as named_codebook
from qlora_lab.quant.plan import Candidate
from qlora_lab.quant.serialize import part_sizes
from qlora_lab.quant.stack import STATE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS, LINEAR = "experts", "linear layers in 4 bits"
EMBEDDINGS, HEAD, OTHERS = "embeddings", "head", "everything else"
BESIDE = "beside the language model"  # a vision tower and a projector, packed or not
KINDS = (EXPERTS, LINEAR, EMBEDDINGS, HEAD, BESIDE, OTHERS)
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts")  # names of k


@dataclass(frozen=True)
class WeightRow:
    """Weights of one kind. Bytes count codes and constants of packed ones; tables are shared and not counted."""

    what: str  # one of KINDS
    weights: int
    stored: int  # bytes
    active: int  # bytes that a forward of one token uses


@dataclass(frozen=True)
class WeightLedger:
    """The rows that are not empty. experts: in each layer that has some, and how many a token uses; 0 without any."""

    rows: tuple[WeightRow, ...]
    experts: int
    experts_per_token: int

    @property
    def stored(self) -> int:
        return sum(row.stored for row in self.rows)

    @property
    def active(self) -> int:
        return sum(row.active for row in self.rows)

    def to_dict(self) -> dict:
        """Return every field and sum, as plain values for JSON."""
        sums = {"stored": self.stored, "active": self.active}
        counts = {"experts": self.experts, "experts_per_token": self.experts_per_token}
        return {"rows": [asdict(row) for row in self.rows], **counts, **sums}


def predicted_weights(
    name_or_path: str | Path,
    codebook: str | None = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    also: Iterable[str] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> WeightLedger:
    """Predict what `load` with these options holds, from config.json alone. Arguments and errors are those of `load`.

    A folder that is in 4 bits already keeps its own options, which the names in its files tell. Raises ValueError also
    for one that a plan has quantised, and for a mixture whose configuration does not say how many experts a token is
    routed to.
    """
    also = as_names(also)
    folder = resolve(name_or_path, progress=False)
    stored = stored_options(folder)
    if isinstance(stored, str):
        raise ValueError(f"{folder} is {stored}, so layers differ: load it, and count with measured_weights")
    check_options(folder, Candidate(codebook, block_size, double_quant), None, also)
    model = empty_model(folder, dtype)  # on the meta device: shapes without bytes
    chosen = Candidate(*(stored or (codebook, block_size, double_quant)))
    files = files_of(folder) if stored else {}
    if stored:  # its files say what beside the language model is packed
        parts = parts_beside(model, packable(model))
        also = tuple(part for part, paths in parts.items() if any(f"{path}.weight.absmax" in files for path in paths))
    options = options_of(model, chosen, None, also)
    if stored:  # its experts may lie there in 16 bits, as bitsandbytes leaves them
        options = {path: o for path, o in options.items() if not is_stack(model, path) or f"{path}.{STATE}" in files}
    dtypes = dtypes_of(model, dtype)
    tied = model.all_tied_weights_keys  # a head that is its embedding is stored once
    sizes = {}
    for name, tensor in model.state_dict().items():
        path = name.removesuffix(".weight")
        if path in options:
            sizes[name] = tensor.numel(), _packed_bytes(model, path, tensor, options[path])
        elif name not in tied:
            sizes[name] = tensor.numel(), tensor.numel() * _itemsize(tensor, dtypes[name])
    return _ledger(model, sizes, {name for name in sizes if name.removesuffix(".weight") in options})


def measured_weights(model: "PreTrainedModel") -> WeightLedger:
    """Count the bytes that a loaded model holds, tensor by tensor. Raises ValueError for a model with adapters."""
    if has_adapters(model):
        raise ValueError("this model has adapters, which are no weights of the base: count before add_lora")
    sizes: dict[str, tuple[int, int]] = {}
    packed = set()
    seen = set()  # addresses: a tied head is the very tensor of the embeddings
    # Buffers that no file holds, such as rotary frequencies, are no weights.
    for path, module in model.named_modules():
        if isinstance(module, PackedModule):
            name = module.key(f"{path}.")
            sizes[name] = module.weight.numel, module.weight.nbytes
            packed.add(name)
        saved = [*module._parameters.items(), *((n, b) for n, b in module._buffers.items() if _is_saved(module, n))]
        for name, tensor in saved:
            if tensor is not None and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                sizes[f"{path}.{name}"] = tensor.numel(), tensor.nbytes
    return _ledger(model, sizes, packed)


def _is_saved(module: nn.Module, buffer: str) -> bool:
    return buffer not in module._non_persistent_buffers_set


def _itemsize(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    return dtype.itemsize if tensor.is_floating_point() else tensor.element_size()


def _packed_bytes(model: nn.Module, path: str, weight: torch.Tensor, options: Candidate) -> int:
    """Count codes and constants: each matrix of a stack has blocks, groups and an offset of its own."""
    # serialize.py knows how many entries each part of a matrix has, also where blocks and groups are partial.
    matrices = len(weight) if is_stack(model, path) else 1
    state = {"shape": [weight.numel() // matrices], "blocksize": options.block_size}
    state |= {"nested_offset": 0.0} if options.double_quant else {}
    # Parts come in the order codes, constants, and their scales with double quantization.
    codes, *constants = part_sizes(state, "", bits_of(named_codebook(options.codebook))).values()
    if not options.double_quant:
        return matrices * (codes + 4 * constants[0])  # float32
    n_blocks, n_groups = constants
    return matrices * (codes + n_blocks + 4 * n_groups + 4)  # 8-bit codes, float32 scales and the offset


def _ledger(model: "PreTrainedModel", sizes: dict[str, tuple[int, int]], packed: set[str]) -> WeightLedger:
    """sizes: name -> (weights, bytes) of each tensor once. packed: names of those in 4 bits."""
    n = k = 0  # a dense model has neither
    sums = {kind: [0, 0, 0] for kind in KINDS}
    head = head_path(model)
    outside = beside(model) - {head}
    for name, (weights, nbytes) in sizes.items():
        path = name.removesuffix(".weight")
        owner_path = name.rpartition(".")[0]
        owner = model.get_submodule(owner_path)
        kind, active = OTHERS, nbytes
        if owner_path in outside:
            kind = BESIDE
        # Biases of experts are routed as their matrices are. A shared expert is an ordinary MLP, always used.
        elif is_stack(model, name) or (layout_of(owner) and name.endswith("_bias")):
            n, k = owner.num_experts, _experts_per_token(model)
            kind, active = EXPERTS, nbytes * k // n  # experts are of one size
        elif isinstance(owner, nn.Embedding):
            kind = EMBEDDINGS
        elif path == head:
            kind = HEAD
        elif name in packed:
            kind = LINEAR
        sums[kind] = [total + more for total, more in zip(sums[kind], (weights, nbytes, active), strict=True)]
    return WeightLedger(tuple(WeightRow(kind, *sums[kind]) for kind in KINDS if sums[kind][0]), n, k)


def _experts_per_token(model: "PreTrainedModel") -> int:
    # Routing is code of the family, not structure: only the configuration says how many experts it takes.
    config = model.config.get_text_config()  # of a model that sees, a part of its configuration
    found = (getattr(config, name, None) for name in PER_TOKEN)
    k = next((value for value in found if isinstance(value, int)), None)
    if k is None:
        kind = type(config).__name__
        raise ValueError(f"{kind} does not say how many experts a token is routed to: it needs {PER_TOKEN[0]}")
    return k
