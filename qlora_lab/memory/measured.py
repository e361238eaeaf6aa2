"""Fill the measured column of a memory ledger: walk the live tensors, and watch a real forward pass.

    measure_memory(model, optimizer, batch) -> Ledger: predicted beside measured

A live storage counts once. A batch is one that data.collate makes.
Not here: what autograd keeps (watched.py).

Python cannot see some rows (the loss's workspace, CUDA's context): they have no measured bytes. For the peak of the
whole process ask train/resident.py.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_lab.adapters.adapter import adapters, has_adapters, method_of
from qlora_lab.adapters.expert_lora import LoRAStack
from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.adapters.model_tensors import model_tensors
from qlora_lab.data.dataset import IGNORED
from qlora_lab.kernels import product
from qlora_lab.memory.ledger import Ledger, LedgerRow
from qlora_lab.memory.predict import MAP_BYTES, MASTERS, PLACES, ledger_of
from qlora_lab.memory.setup import Setup
from qlora_lab.memory.shape import Shape, shape_of
from qlora_lab.memory.sight import PROJECTOR, TOWER
from qlora_lab.memory.watched import Storages, watched
from qlora_lab.model.experts4bit import Stack4bit
from qlora_lab.model.language_model import parts_beside
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.model.loaded import check_model
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.model.pair_attention import NAME as PAIRS
from qlora_lab.model.wide import NAME as WIDE
from qlora_lab.optim.master_copies import MasterCopies
from qlora_lab.optim.paged_adamw import PagedAdamW
from qlora_lab.quant.quantize import Quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure_memory(
    model: "PreTrainedModel",
    optimizer: torch.optim.Optimizer | None = None,
    batch: dict[str, torch.Tensor] | None = None,
) -> Ledger:
    """Predict and measure the ledger of `model` as it is.

    optimizer: its moments are measured, if it has made a step. batch: a forward pass in training mode measures the
    activations; the mask has effect only if some row is not full. Without them, those rows stay unmeasured.
    Raises whatever shape_of raises, and ValueError for a model that has adapters on, or quantises, some layers of a
    name but not all of them.
    """
    check_model(model)
    shape = shape_of(model)
    ledger = ledger_of(shape, setup_of(model, shape, optimizer, batch))
    measured = _walk(model)
    if optimizer is not None:
        measured.update(_moments(optimizer))
    if batch is not None:
        measured.update(watched(model, batch, shape))
        if any(isinstance(m, Linear4bit) and m.takes_adapter for m in model.modules()):
            measured["decoded weight"] = sum(buffer.nbytes for buffer in vars(product._local).values())
    return replace(ledger, rows=tuple(_filled(ledger.rows, measured)))


def _filled(rows: tuple[LedgerRow, ...], measured: Counter) -> Iterator[LedgerRow]:
    """Yield rows with their measured bytes. Two rows of one name (in two dtypes) share the bytes in their order."""
    left = Counter(measured)
    last = {row.what: number for number, row in enumerate(rows)}
    for number, row in enumerate(rows):
        if row.what not in measured:
            yield row
        else:
            part = left[row.what] if last[row.what] == number else min(row.predicted, left[row.what])  # the last: all
            left[row.what] -= part
            yield replace(row, measured=part)


# ---------------------------------------------------------------------------------------------------- what the model is


def setup_of(
    model: "PreTrainedModel",
    shape: Shape,
    optimizer: torch.optim.Optimizer | None = None,
    batch: dict[str, torch.Tensor] | None = None,
) -> Setup:
    """Describe this model, optimizer and batch as a Setup."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    packed = [m.weight for m in model.modules() if isinstance(m, Linear4bit)]
    options: dict = {"method": "qlora" if packed else "lora" if layers else "full"}
    if has_adapters(model) and method_of(model) != "lora":
        options = {"method": method_of(model), "codebook": "none"}
        options |= {} if layers else next(iter(adapters(model).values())).settings()
    stacks = [m.weight for m in model.modules() if isinstance(m, Stack4bit)]
    if packed:
        q = packed[0]
        kinds = sorted({(weight.codebook, weight.block_size, weight.double_quant) for weight in (*packed, *stacks)})
        if len(kinds) > 1:
            raise ValueError(
                f"layers are quantised in {len(kinds)} ways, such as {kinds[0]} and {kinds[1]}: give all the same"
            )
        options |= {"codebook": q.codebook, "block_size": q.block_size, "double_quant": q.double_quant}
    if layers:
        adapter = layers[0]
        names = {_target(path, m) for path, m in model.named_modules() if isinstance(m, LoRALinear)}
        options |= {"r": adapter.r, "targets": tuple(sorted(names)), "dropout": adapter.dropout.p}
        options |= {"adapter_dtype": adapter.lora_A.dtype}
        if len(layers) != len(names) * shape.layers:
            raise ValueError(
                f"{len(layers)} adapters with {len(names)} names in {shape.layers} layers: "
                "adapt the same layers in every block"
            )
        if len(ranks := {layer.r for layer in layers}) > 1:
            listed = ", ".join(map(str, sorted(ranks)))
            raise ValueError(f"adapters have ranks {listed}, but a ledger has one: give all the same")
    also, expected = _also(model, shape)
    if packed and len(packed) != expected:
        raise ValueError(f"{len(packed)} of {expected} linear layers are quantised: quantise all of them")
    options["also"] = also
    if len(stacks) != len(shape.expert) * shape.layers * bool(packed):
        raise ValueError(
            f"{len(stacks)} of {len(shape.expert) * shape.layers} stacks of experts are quantised beside "
            f"{len(packed)} linear layers: quantise all of them, or none"
        )
    if layers:
        exact = adapter.lora_A.dtype == torch.float32
        options["fused_adapter"] = bool(packed) and adapter.base.takes_adapter and exact and not adapter.dropout.p
    options |= {"dtype": model.dtype, "device": model.device.type}
    options["wide_attention"] = model.config._attn_implementation == WIDE
    options["pair_attention"] = model.config._attn_implementation == PAIRS
    options["gradient_checkpointing"] = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    options["master_copies"] = optimizer is None or isinstance(optimizer, MasterCopies)
    return Setup(**options, **_optimizer_options(optimizer), **_batch_options(batch))


def _also(model: nn.Module, shape: Shape) -> tuple[tuple[str, ...], int]:
    """Return the parts beside the language model that are packed, and how many packed layers there are with them."""
    found = parts_beside(model, {path for path, m in model.named_modules() if isinstance(m, Linear4bit)})
    parts = [part for part in (shape.sight.parts if shape.sight else ()) if part.name in found]
    beside = sum(times for part in parts for _, times in part.linears)
    return tuple(part.name for part in parts), len(shape.linears) * shape.layers + beside


def _target(path: str, layer: LoRALinear) -> str:
    """Return the name by which a target is asked for: a stack's with its module's, for layers may have the same."""
    return ".".join(path.split(".")[-2 if isinstance(layer, LoRAStack) else -1 :])


def _optimizer_options(optimizer: torch.optim.Optimizer | None) -> dict:
    optimizer = getattr(optimizer, "inner", optimizer)  # of MasterCopies
    if not isinstance(optimizer, PagedAdamW):
        return {}
    pages = optimizer.pages
    budget = len(pages.frames) * pages.page_size if len(pages.frames) < pages.count else None  # None: all fit
    return {"paged": True, "optimizer_bits": optimizer.bits, "optimizer_budget": budget}


def _batch_options(batch: dict[str, torch.Tensor] | None) -> dict:
    if batch is None:
        return {}
    rows, length = batch["input_ids"].shape
    labels = int((batch["labels"][:, 1:] != IGNORED).sum())  # the first token has nothing to predict it
    pictures = len(batch.get("pixel_values", ()))
    if pictures % rows:
        raise ValueError(f"{pictures} pictures in {rows} rows: a ledger takes as many in each row")
    mask = batch.get("attention_mask")
    options = {"batch_size": rows, "length": length, "learned": labels / (rows * length), "pictures": pictures // rows}
    return options | {"packing": "position_ids" in batch, "padded": mask is not None and not bool(mask.all())}


# ------------------------------------------------------------------------------------ weights, gradients and moments


def _walk(model: nn.Module) -> Counter:
    storages = Storages()
    beside = _named_beside(model)
    for kind, tensor in model_tensors(model):
        if isinstance(tensor, Quantized):
            _walk_quantized(storages, kind, tensor)
        else:
            storages.add(beside.get(id(tensor), kind), tensor)
    if any(isinstance(m, PackedModule) and m.weight.double_quant for m in model.modules()):
        storages.sums["tables"] += MAP_BYTES  # one for the whole process
    storages.sums["head"] += 0  # a tied head shares the embeddings' storage, seen before
    for parameter in model.parameters():
        if parameter.grad is not None:
            storages.add("gradients", parameter.grad)
    return storages.sums


def _named_beside(model: nn.Module) -> dict[int, str]:
    """Return id of a tensor -> its row, for those beside the language model; packed weights have rows of their own."""
    names = {}
    found = parts_beside(model, {path for path, _ in model.named_modules()})
    for part in (TOWER, PROJECTOR):  # a head stands beside the language model, too
        for module in map(model.get_submodule, found.get(part, ())):
            owned = () if isinstance(module, PackedModule) else module.named_buffers(recurse=False)
            names |= {id(p): part for p in module.parameters(recurse=False)}
            names |= {id(buffer): PLACES if name == "position_ids" else part for name, buffer in owned}
    return names


def _walk_quantized(storages: Storages, kind: str, q: Quantized) -> None:
    storages.add(kind, q.packed)
    storages.add("tables", q.levels)
    if q.double_quant:
        storages.add("absmax codes", q.constants.absmax_codes)
        storages.add("group scales", q.constants.absmax_scale)
        storages.add("offsets", q.constants.absmax_offset)
    else:
        storages.add("absmax", q.constants)


def _moments(optimizer: torch.optim.Optimizer) -> Counter:
    sums = Counter()
    if isinstance(optimizer, MasterCopies):
        pairs = zip(optimizer.param_groups[0]["params"], optimizer.masters, strict=True)
        sums[MASTERS] = sum(master.nbytes for p, master in pairs if p is not master)
        optimizer = optimizer.inner
    for state in optimizer.state.values():
        for name, tensor in state.items():
            sums["step counters" if name == "step" else "moments"] += tensor.untyped_storage().nbytes()
    if isinstance(optimizer, PagedAdamW):  # its state lies in pages, and only frames are in memory
        sums["moments"] = sum(frame.nbytes for frame in optimizer.pages.frames)
    return sums


# ---------------------------------------------------------------------------------------------------- the whole process
