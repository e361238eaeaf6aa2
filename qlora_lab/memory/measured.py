"""The measured column of a memory ledger: live tensors walked, a real forward pass watched.

    measure_memory(model, optimizer, batch) -> Ledger: predicted beside measured

In: a model of transformers, usually quantised and with adapters; the optimizer that it was trained with; a batch as
data.collate makes it. Out: predict_memory's Ledger for that very model, with the bytes of storages that are there, each
counted once, and of what autograd keeps, told apart by the module that keeps it.

A row that cannot be seen from here (a loss's workspace, CUDA's context) has no measured bytes. peak_resident says what
the whole process had at most.
Not here: predictions (predict.py).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_lab.adapters.lora import LoRALinear
from qlora_lab.adapters.model_tensors import PACKED, model_tensors
from qlora_lab.data.dataset import IGNORED
from qlora_lab.kernels import product
from qlora_lab.memory.activations import (
    ADAPTER,
    ATTENTION,
    CHECKPOINT,
    INDICES,
    INPUT,
    MASK,
    NORM,
    ROTARY,
    SWIGLU,
)
from qlora_lab.memory.ledger import Ledger, Row
from qlora_lab.memory.predict import MAP_BYTES, ledger_of
from qlora_lab.memory.setup import Setup
from qlora_lab.memory.shape import Shape, shape_of
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.model.modes import mode, own_draws
from qlora_lab.model.wide import NAME as WIDE
from qlora_lab.optim.paged_adamw import PagedAdamW
from qlora_lab.quant.quantize import QuantizedTensor
from qlora_lab.train.loss import answer_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): what clear_refs takes to set VmHWM to what is resident now
LOG_SOFTMAX = "log-softmax"


def measure_memory(
    model: "PreTrainedModel",
    optimizer: torch.optim.Optimizer | None = None,
    batch: dict[str, torch.Tensor] | None = None,
) -> Ledger:
    """The ledger of `model` as it is, predicted and measured.

    optimizer: for its moments, if it made a step. batch: for activations, by a forward pass in training mode; its mask
    is taken to have effect where a row is not full. Without either, those rows stay unmeasured.
    Raises what shape_of raises, and ValueError for a model of which some layers have adapters or are quantised and
    others of the same name are not.
    """
    shape = shape_of(model)
    ledger = ledger_of(shape, setup_of(model, shape, optimizer, batch))
    found = _walk(model)
    if optimizer is not None:
        found.update(_moments(optimizer))
    if batch is not None:
        found.update(_watched(model, batch, shape))
        if any(isinstance(m, Linear4bit) and m.takes_adapter for m in model.modules()):
            found["decoded weight"] = sum(kept.nbytes for kept in vars(product._local).values())
    return replace(ledger, rows=tuple(_filled(ledger.rows, found)))


def _filled(rows: tuple[Row, ...], found: Counter) -> Iterator[Row]:
    """Rows with what was found. Two rows of one name, in dtypes of their own, share it out in their order."""
    left = Counter(found)
    last = {row.what: number for number, row in enumerate(rows)}
    for number, row in enumerate(rows):
        if row.what not in found:
            yield row
        else:
            part = left[row.what] if last[row.what] == number else min(row.predicted, left[row.what])
            left[row.what] -= part
            yield replace(row, measured=part)


# ---------------------------------------------------------------------------------------------------- what the model is


def setup_of(
    model: "PreTrainedModel",
    shape: Shape,
    optimizer: torch.optim.Optimizer | None = None,
    batch: dict[str, torch.Tensor] | None = None,
) -> Setup:
    """The Setup that describes this model, optimizer and batch."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    packed = [m.weight for m in model.modules() if isinstance(m, Linear4bit)]
    options: dict = {"method": "qlora" if packed else "lora" if layers else "full"}
    if packed:
        q = packed[0]
        kinds = sorted({(one.codebook, one.block_size, one.double_quant) for one in packed})
        if len(kinds) > 1:
            raise ValueError(
                f"layers are quantised in {len(kinds)} ways, such as {kinds[0]} and {kinds[1]}: a ledger tells of one"
            )
        options |= {"codebook": q.codebook, "block_size": q.block_size, "double_quant": q.double_quant}
    if layers:
        one = layers[0]
        names = {path.split(".")[-1] for path, m in model.named_modules() if isinstance(m, LoRALinear)}
        options |= {"r": one.r, "targets": tuple(sorted(names)), "dropout": one.dropout.p}
        options |= {"adapter_dtype": one.lora_A.dtype}
        if len(layers) != len(names) * shape.layers:
            raise ValueError(f"{len(layers)} adapters with {len(names)} names in {shape.layers} layers: some lack one")
        if len(ranks := {layer.r for layer in layers}) > 1:
            found = ", ".join(map(str, sorted(ranks)))
            raise ValueError(f"adapters have ranks {found}, but a ledger has one: give all the same")
    if packed and len(packed) != len(shape.linears) * shape.layers:
        raise ValueError(f"{len(packed)} of {len(shape.linears) * shape.layers} linear layers are quantised: not all")
    if layers:
        exact = one.lora_A.dtype == torch.float32
        options["fused_adapter"] = bool(packed) and one.base.takes_adapter and exact and not one.dropout.p
    options |= {"dtype": model.dtype, "device": model.device.type, "wide_attention": _is_wide(model)}
    options["gradient_checkpointing"] = _recomputes(model)
    return Setup(**options, **_optimizer_options(optimizer), **_batch_options(batch))


def _is_wide(model: "PreTrainedModel") -> bool:
    return model.config._attn_implementation == WIDE


def _recomputes(model: "PreTrainedModel") -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _optimizer_options(optimizer: torch.optim.Optimizer | None) -> dict:
    if not isinstance(optimizer, PagedAdamW):
        return {}
    pages = optimizer.pages
    budget = len(pages.frames) * pages.page_size if len(pages.frames) < pages.count else None
    return {"paged": True, "optimizer_bits": optimizer.bits, "optimizer_budget": budget}


def _batch_options(batch: dict[str, torch.Tensor] | None) -> dict:
    if batch is None:
        return {}
    rows, length = batch["input_ids"].shape
    labels = int((batch["labels"][:, 1:] != IGNORED).sum())
    mask = batch.get("attention_mask")
    options = {"batch_size": rows, "length": length, "learned": labels / (rows * length)}
    return options | {"packing": "position_ids" in batch, "padded": mask is not None and not bool(mask.all())}


# ------------------------------------------------------------------------------------------------- what there always is


@dataclass
class _Storages:
    """Bytes by what they are; each storage counts once, for what it was first seen as."""

    sums: Counter = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)

    def add(self, what: str, tensor: torch.Tensor) -> None:
        new = _address(tensor) not in self.seen
        self.sums[what] += tensor.untyped_storage().nbytes() if new else 0
        self.seen.add(_address(tensor))


def _walk(model: nn.Module) -> Counter:
    """Weights, adapters, and gradients that are there."""
    storages = _Storages()
    for kind, tensor in model_tensors(model):
        if kind == PACKED:
            _walk_quantized(storages, tensor)
        else:
            storages.add(kind, tensor)
    if any(isinstance(m, Linear4bit) and m.weight.double_quant for m in model.modules()):
        storages.sums["tables"] += MAP_BYTES  # one for the process, wherever it was first asked for
    storages.sums["head"] += 0  # a tied one is not among the modules' tensors a second time
    for parameter in model.parameters():
        if parameter.grad is not None:
            storages.add("gradients", parameter.grad)
    return storages.sums


def _walk_quantized(storages: _Storages, q: QuantizedTensor) -> None:
    storages.add(PACKED, q.packed)
    storages.add("tables", q.levels)
    if q.double_quant:
        storages.add("absmax codes", q.constants.absmax_codes)
        storages.add("group scales", q.constants.absmax_scale)
        storages.add("offsets", q.constants.absmax_offset)
    else:
        storages.add("absmax", q.constants)


def _moments(optimizer: torch.optim.Optimizer) -> Counter:
    found = Counter()
    for state in optimizer.state.values():
        for name, tensor in state.items():
            found["step counters" if name == "step" else "moments"] += tensor.untyped_storage().nbytes()
    if isinstance(optimizer, PagedAdamW):
        found["moments"] = sum(frame.nbytes for frame in optimizer.pages.frames)
    return found


# -------------------------------------------------------------------------------------------- what a forward pass keeps


def _watched(model: "PreTrainedModel", batch: dict[str, torch.Tensor], shape: Shape) -> Counter:
    """Bytes that a forward pass keeps for its backward pass, by kind; weights are not counted."""
    storages, rotary, inside = _Storages(), set(), []
    for tensor in (*model.parameters(), *model.buffers()):
        storages.seen.add(_address(tensor))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        path, module = inside[-1] if inside else ("", None)
        kind = ROTARY if _address(tensor) in rotary else _kind(path, module, tensor, shape)
        storages.add(kind, tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    following = _following(model, inside, rotary)
    with mode(model, training=True), own_draws(model), following, torch.enable_grad(), hooks:
        loss = answer_loss(model, batch)[0]  # while it lives, so does what it keeps, and no address is used twice
        del loss
    return storages.sums


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _following(model: nn.Module, inside: list[tuple[str, nn.Module]], rotary: set[int]) -> Iterator[None]:
    """Keep in `inside` the modules whose forward is running, the innermost last, and in `rotary` where their tables
    are: every layer gets the same."""
    hooks = []
    for path, module in model.named_modules():
        enter = lambda m, args, path=path: inside.append((path, m))  # noqa: E731
        leave = lambda m, args, output: inside.pop() and None  # noqa: E731 - pop is a tuple; None changes no output
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        if path.endswith("rotary_emb"):
            hooks.append(module.register_forward_hook(lambda m, args, output: rotary.update(map(_address, output))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _kind(path: str, module: nn.Module | None, tensor: torch.Tensor, shape: Shape) -> str:
    """What a tensor is, told by the module that keeps it, then by its form."""
    names = path.split(".")
    if module is None:
        return LOG_SOFTMAX if tensor.dim() == 2 and tensor.shape[-1] == shape.vocabulary else INDICES
    if not tensor.is_floating_point():
        return INDICES if names[-1] != "dropout" else INPUT
    if "norm" in names[-1]:
        return NORM
    if names[-1] == "self_attn":
        of_no_head = tensor.dim() == 4 and tensor.shape[1] == 1 and tensor.shape[-1] == tensor.shape[-2]
        return MASK if of_no_head else ATTENTION
    if names[-1] in ("mlp", "act_fn"):
        return SWIGLU
    if names[-1].isdigit():
        return CHECKPOINT
    return _of_a_linear(names, tensor, module)


def _of_a_linear(names: list[str], tensor: torch.Tensor, module: nn.Module) -> str:
    inner = module.base if isinstance(module, LoRALinear) else module
    width = getattr(inner, "in_features", tensor.shape[-1])
    thin = tensor.dim() == 2 and tensor.stride(0) == 1 < tensor.shape[0] and tensor.shape[0] != tensor.shape[1]
    return INPUT if tensor.shape[-1] == width and not thin else ADAPTER


# ---------------------------------------------------------------------------------------------------- the whole process


def peak_resident() -> int | None:
    """The most bytes of memory that this process had since it began, or since reset_peak. None where Linux is not."""
    return _status("VmHWM")


def resident() -> int | None:
    """Bytes of memory that this process has. None where Linux is not."""
    return _status("VmRSS")


def reset_peak() -> bool:
    """Let peak_resident begin anew. Returns whether the system allowed it."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    if not STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
