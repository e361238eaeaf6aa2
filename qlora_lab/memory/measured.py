"""Fill the measured column of a memory ledger: walk the live tensors, and watch a real forward pass.

    measure_memory(model, optimizer, batch) -> Ledger: predicted beside measured

A live storage counts once. A tensor that autograd keeps is named after the module that keeps it. A batch is one that
data.collate makes.

Python cannot see some rows (the loss's workspace, CUDA's context): they have no measured bytes. peak_resident asks
Linux for the peak of the whole process.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_lab.adapters.adapter import Adapter, adapters, has_adapters, method_of
from qlora_lab.adapters.dora import DoRALinear
from qlora_lab.adapters.expert_lora import LoRAStack
from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.adapters.model_tensors import model_tensors
from qlora_lab.adapters.pissa import PissaLinear
from qlora_lab.adapters.prefix_tuning import PATH as PREFIX
from qlora_lab.data.dataset import IGNORED
from qlora_lab.kernels import product
from qlora_lab.memory.activations import (
    ADAPTER,
    ATTENTION,
    CHECKPOINT,
    EXPERT_ACTIVATIONS,
    INDICES,
    INPUT,
    MASK,
    NORM,
    ROTARY,
    ROUTING,
    SWIGLU,
    TURNED,
)
from qlora_lab.memory.ledger import Ledger, LedgerRow
from qlora_lab.memory.predict import MAP_BYTES, MASTERS, ledger_of
from qlora_lab.memory.setup import Setup
from qlora_lab.memory.shape import Shape, shape_of
from qlora_lab.model.experts4bit import Stack4bit
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.model.modes import mode, own_draws
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.model.wide import NAME as WIDE
from qlora_lab.optim.master_copies import MasterCopies
from qlora_lab.optim.paged_adamw import PagedAdamW
from qlora_lab.quant.quantize import Quantized
from qlora_lab.train.loss import answer_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): written to clear_refs, it sets VmHWM to the resident size of this moment
LOG_SOFTMAX = "log-softmax"
Running = tuple[str, nn.Module, int | None]  # path, module, and the address of what it reads


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
    shape = shape_of(model)
    ledger = ledger_of(shape, setup_of(model, shape, optimizer, batch))
    measured = _walk(model)
    if optimizer is not None:
        measured.update(_moments(optimizer))
    if batch is not None:
        measured.update(_watched(model, batch, shape))
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
    if packed and len(packed) != len(shape.linears) * shape.layers:
        raise ValueError(
            f"{len(packed)} of {len(shape.linears) * shape.layers} linear layers are quantised: quantise all of them"
        )
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
    options["gradient_checkpointing"] = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    options["master_copies"] = optimizer is None or isinstance(optimizer, MasterCopies)
    return Setup(**options, **_optimizer_options(optimizer), **_batch_options(batch))


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
    mask = batch.get("attention_mask")
    options = {"batch_size": rows, "length": length, "learned": labels / (rows * length)}
    return options | {"packing": "position_ids" in batch, "padded": mask is not None and not bool(mask.all())}


# ------------------------------------------------------------------------------------ weights, gradients and moments


@dataclass
class _Storages:
    """Bytes by kind. A storage counts once, as the kind that it was first seen as."""

    sums: Counter = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)  # addresses

    def add(self, what: str, tensor: torch.Tensor) -> None:
        new = _address(tensor) not in self.seen
        self.sums[what] += tensor.untyped_storage().nbytes() if new else 0
        self.seen.add(_address(tensor))


def _walk(model: nn.Module) -> Counter:
    storages = _Storages()
    for kind, tensor in model_tensors(model):
        if isinstance(tensor, Quantized):
            _walk_quantized(storages, kind, tensor)
        else:
            storages.add(kind, tensor)
    if any(isinstance(m, PackedModule) and m.weight.double_quant for m in model.modules()):
        storages.sums["tables"] += MAP_BYTES  # one for the whole process
    storages.sums["head"] += 0  # a tied head shares the embeddings' storage, seen before
    for parameter in model.parameters():
        if parameter.grad is not None:
            storages.add("gradients", parameter.grad)
    return storages.sums


def _walk_quantized(storages: _Storages, kind: str, q: Quantized) -> None:
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


# -------------------------------------------------------------------------------------------- what a forward pass keeps


def _watched(model: "PreTrainedModel", batch: dict[str, torch.Tensor], shape: Shape) -> Counter:
    """Sum, by kind, the bytes that a forward pass keeps for its backward pass; weights do not count."""
    storages = _Storages()
    rotary: set[int] = set()
    running: list[Running] = []
    for tensor in (*model.parameters(), *model.buffers()):
        storages.seen.add(_address(tensor))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        path, module, _ = running[-1] if running else ("", None, None)  # no module: the loss itself keeps it
        kind = ROTARY if _address(tensor) in rotary else _kind(path, module, tensor, shape)
        if _is_made_by_pissa(running, tensor):
            kind = ADAPTER
        storages.add(kind, tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    following = _following(model, running, rotary)
    with mode(model, training=True), own_draws(model), following, torch.enable_grad(), hooks:
        loss = answer_loss(model, batch)[0]  # keeps the graph alive, so that no address is used twice
        del loss
    return storages.sums


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _following(model: nn.Module, running: list[Running], rotary: set[int]) -> Iterator[None]:
    """Keep in `running` the modules whose forward runs now, the innermost last, and in `rotary` the addresses of the
    rotary tables, which all layers share."""
    hooks = []
    for path, module in model.named_modules():
        enter = lambda m, args, path=path: running.append((path, m, _read(args)))  # noqa: E731
        leave = lambda m, args, output: running.pop() and None  # noqa: E731 - None leaves the output unchanged
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        if path.endswith("rotary_emb"):
            hooks.append(module.register_forward_hook(lambda m, args, output: rotary.update(map(_address, output))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read(args: tuple) -> int | None:
    """Return the address of a module's first input, if it is a tensor."""
    return _address(args[0]) if args and isinstance(args[0], torch.Tensor) else None


def _is_made_by_pissa(running: list[Running], tensor: torch.Tensor) -> bool:
    """Tell whether the base within a PissaLinear keeps a factor, or their inner product, and not its own input."""
    inside = len(running) > 1 and isinstance(running[-2][1], PissaLinear)
    return inside and _address(tensor) != running[-1][2]


def _kind(path: str, module: nn.Module | None, tensor: torch.Tensor, shape: Shape) -> str:
    """Tell what a tensor is, by the module that keeps it and then by its shape."""
    names = path.split(".")
    if module is None:
        return LOG_SOFTMAX if tensor.dim() == 2 and tensor.shape[-1] == shape.vocabulary else INDICES
    if names[0] == PREFIX or (isinstance(module, Adapter) and not isinstance(module, LoRALinear)):
        return ADAPTER
    if isinstance(module, DoRALinear) and _is_turned(module, tensor):
        return TURNED
    if "experts" in names:
        # The weight of a pair is one number; Python cannot tell an answer from a gate of the same width, nor from what
        # an adapter keeps. (On a GPU with r = 1 an inner product is one number, too, and counts as routing.)
        return EXPERT_ACTIVATIONS if tensor.is_floating_point() and tensor.shape[-1] > 1 else ROUTING
    if shape.experts and names[-1] == "gate":
        return ROUTING
    if not tensor.is_floating_point():
        return INDICES if names[-1] != "dropout" else INPUT
    if "norm" in names[-1]:
        return NORM
    if names[-1] == "self_attn":
        # a prefix makes keys without queries, so a mask need not be square
        own = tensor.dim() == 4 and tensor.shape[1] == 1  # a mask is (rows, 1, length, keys)
        is_mask = own and (tensor.shape[-1] == tensor.shape[-2] or tensor.shape[-1] != shape.head_dim)
        return MASK if is_mask else ATTENTION
    if shape.shared and names[-1] == "mlp":
        return ROUTING  # the block weighs the shared expert's answer
    if names[-1] in ("mlp", "act_fn", "shared_expert"):
        return SWIGLU
    if names[-1].isdigit():
        return CHECKPOINT  # a layer by its number: torch.utils.checkpoint keeps its input
    return _of_a_linear(names, tensor, module)


def _is_turned(layer: DoRALinear, tensor: torch.Tensor) -> bool:
    """Tell an output, (tokens, out) in a shared expert and elsewhere (rows, length, out), from LoRA's matrices."""
    return tensor.dim() != 2 or (tensor.shape[-1] == layer.base.out_features and tensor.shape[0] != layer.r)


def _of_a_linear(names: list[str], tensor: torch.Tensor, module: nn.Module) -> str:
    """Tell the input of a linear layer from an adapter's inner product, (tokens, r), and its cast matrices."""
    inner = module.base if isinstance(module, LoRALinear) else module
    width = getattr(inner, "in_features", tensor.shape[-1])
    # A transposed (in, r) matrix: contiguous along its first axis. Its last axis can have any length.
    thin = tensor.dim() == 2 and tensor.stride(0) == 1 < tensor.shape[0] and tensor.shape[0] != tensor.shape[1]
    return INPUT if tensor.shape[-1] == width and not thin else ADAPTER


# ---------------------------------------------------------------------------------------------------- the whole process


def peak_resident() -> int | None:
    """Return the peak of this process's resident bytes since its start or reset_peak. None on systems without /proc."""
    return _status("VmHWM")


def resident() -> int | None:
    """Return the resident bytes of this process. None on systems without /proc."""
    return _status("VmRSS")


def reset_peak() -> bool:
    """Start the peak of peak_resident again. Returns whether the system allowed it."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    if not STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024  # Linux says kB and means KiB
