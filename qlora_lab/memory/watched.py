"""Watch a real forward pass, and sum what autograd keeps for the backward pass, by the rows of a ledger.

In: a model and a batch, as data.collate makes it. Out: bytes by kind (activations.py names the kinds).
A tensor that autograd keeps is named after the module that keeps it, and then by its shape. A live storage counts once.
Source: torch.autograd.graph.saved_tensors_hooks, which sees each tensor that an operation keeps.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_lab.adapters.adapter import Adapter
from qlora_lab.adapters.dora import DoRALinear
from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.adapters.pissa import PissaLinear
from qlora_lab.adapters.prefix_tuning import PATH as PREFIX
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
from qlora_lab.memory.shape import Shape
from qlora_lab.memory.sight import TOWER
from qlora_lab.model.modes import mode, own_draws
from qlora_lab.train.loss import answer_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOG_SOFTMAX = "log-softmax"
Running = tuple[str, nn.Module, int | None]  # path, module, and the address of what it reads


@dataclass
class Storages:
    """Bytes by kind. A storage counts once, as the kind that it was first seen as."""

    sums: Counter = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)  # addresses

    def add(self, what: str, tensor: torch.Tensor) -> None:
        new = address(tensor) not in self.seen
        self.sums[what] += tensor.untyped_storage().nbytes() if new else 0
        self.seen.add(address(tensor))


def watched(model: "PreTrainedModel", batch: dict[str, torch.Tensor], shape: Shape) -> Counter:
    """Sum, by kind, the bytes that a forward pass keeps for its backward pass; weights do not count."""
    storages = Storages()
    rotary: set[int] = set()
    running: list[Running] = []
    for tensor in (*model.parameters(), *model.buffers()):
        storages.seen.add(address(tensor))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        path, module, _ = running[-1] if running else ("", None, None)  # no module: the loss itself keeps it
        if TOWER in path.split("."):
            # Nothing in a frozen tower has a gradient. A layer that would be computed again keeps its input all the
            # same, until the end of its own forward.
            return tensor
        kind = ROTARY if address(tensor) in rotary else _kind(path, module, tensor, shape)
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


def address(tensor: torch.Tensor) -> int:
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
            hooks.append(module.register_forward_hook(lambda m, args, output: rotary.update(map(address, output))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read(args: tuple) -> int | None:
    """Return the address of a module's first input, if it is a tensor."""
    return address(args[0]) if args and isinstance(args[0], torch.Tensor) else None


def _is_made_by_pissa(running: list[Running], tensor: torch.Tensor) -> bool:
    """Tell whether the base within a PissaLinear keeps a factor, or their inner product, and not its own input."""
    inside = len(running) > 1 and isinstance(running[-2][1], PissaLinear)
    return inside and address(tensor) != running[-1][2]


def _kind(path: str, module: nn.Module | None, tensor: torch.Tensor, shape: Shape) -> str:
    """Tell what a tensor is, by the module that keeps it and then by its shape."""
    names = path.split(".")
    if module is None:
        return LOG_SOFTMAX if tensor.dim() == 2 and tensor.shape[-1] == shape.vocabulary else INDICES
    if names[0] == PREFIX or (isinstance(module, Adapter) and not isinstance(module, LoRALinear)):
        return ADAPTER
    if isinstance(module, DoRALinear) and _is_turned(names, module, tensor):
        return TURNED
    if "experts" in names:
        # The weight of a pair is one number; Python cannot tell an answer from a gate of the same width, nor from what
        # an adapter keeps. (Where an adapter has a product of its own, one of r = 1 counts as routing, too.)
        is_weight = tensor.shape[-1] == 1 and names[-1] == "experts"
        return EXPERT_ACTIVATIONS if tensor.is_floating_point() and not is_weight else ROUTING
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


def _is_turned(names: list[str], layer: DoRALinear, tensor: torch.Tensor) -> bool:
    """Tell an output and its factors from the matrices of LoRA's products."""
    # Outputs are (rows, length, out). A shared expert has (tokens, out), beside (r, out) for B and, mostly narrower or
    # wider, its input.
    is_answer = tensor.shape[-1:] == (layer.base.out_features,) and tensor.shape[0] != layer.r
    return tensor.dim() != 2 or ("shared_expert" in names and is_answer)


def _of_a_linear(names: list[str], tensor: torch.Tensor, module: nn.Module) -> str:
    """Tell the input of a linear layer from an adapter's inner product, (tokens, r), and its cast matrices."""
    inner = module.base if isinstance(module, LoRALinear) else module
    width = getattr(inner, "in_features", tensor.shape[-1])
    # A transposed (in, r) matrix: contiguous along its first axis. Its last axis can have any length.
    thin = tensor.dim() == 2 and tensor.stride(0) == 1 < tensor.shape[0] and tensor.shape[0] != tensor.shape[1]
    return INPUT if tensor.shape[-1] == width and not thin else ADAPTER
