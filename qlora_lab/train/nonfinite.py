"""Find where a value first stops being finite: in a parameter, in a forward pass, or in the backward pass after it.

A loss of NaN names no layer, and everything after the first bad value is bad as well. So only the first one counts, in
the order of computation: parameters and the constants of 4-bit weights; then the first argument of each module and its
output; then gradients, from the loss backwards.
The loss is the mean over the batch's labels, as in a training step. The model keeps its mode.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_lab.model.modes import own_draws
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.quant.finite import largest_magnitude
from qlora_lab.train.loss import answer_loss

LARGEST_HALF = torch.finfo(torch.float16).max  # 65,504
WHAT = {
    "parameter": "the parameter {}",
    "input": "what is computed for {}",  # by the module around it, between two calls
    "output": "the output of {}",
    "gradient": "the gradient of {}",
}


@dataclass(frozen=True)
class NonFinite:
    """The first tensor with a NaN or an infinity."""

    kind: str  # "parameter", "input", "output" or "gradient"
    name: str  # a module's path or a parameter's name, or "loss"
    dtype: str  # such as "float16"
    bad: int  # of the `total` values
    total: int
    # The largest finite magnitude that entered; for a gradient, in all gradients before it; None if nothing entered.
    largest: float | None

    def __str__(self) -> str:
        notes = [f"the largest that entered is {self.largest:.1e}"] if self.largest is not None else []
        if self.dtype == "float16":
            notes.append(f"float16 ends at {LARGEST_HALF:,.0f}: use bfloat16 or float32")
        of = f"{self.bad:,} of {self.total:,} value{'s' if self.total > 1 else ''}"
        text = f"{WHAT[self.kind].format(self.name)}, {self.dtype}, has {of} not finite"
        return f"{text} ({'; '.join(notes)})" if notes else text


def first_nonfinite(model: nn.Module, batch: dict[str, torch.Tensor]) -> NonFinite | None:
    """The first value that is not finite in one training step without its update, or None.

    Parameters, gradients, hooks and the random state stay as they were.
    """
    if bad := _parameter(model):
        return bad
    watch = _Watch()
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        with own_draws(model), torch.enable_grad():
            with _watched(model, watch):
                summed, count = answer_loss(model, batch)
                loss = summed / max(count, 1)
                watch.look("output", "loss", loss, None)
            if watch.found is None and loss.requires_grad:  # after a bad forward pass all gradients are bad
                for p, _ in gradients:
                    p.grad = None  # the caller's may be bad already
                loss.backward()
    finally:
        watch.release()
        for p, gradient in gradients:
            p.grad = gradient
    return watch.found


class _Watch:
    """Look at tensors in the order in which they are computed, and keep the first bad one."""

    def __init__(self):
        self.found: NonFinite | None = None
        self._before: float | None = None  # the largest magnitude in the gradients so far
        self._handles = []  # of hooks on tensors, to be removed

    # no_grad: a checkpointed layer runs again without hooks, and must then keep the same tensors for its gradients
    @torch.no_grad()
    def look(self, kind: str, name: str, value: Any, entered: Any) -> None:
        for tensor in _floats(value):
            if self.found is None and not math.isfinite(largest_magnitude(tensor)):
                self.found = _report(kind, name, tensor, largest_finite(entered))

    def follow(self, name: str, value: Any) -> None:
        """Look at the gradient of each tensor in `value` when the backward pass reaches it."""
        for tensor in _floats(value):
            if tensor.requires_grad:
                self._handles.append(tensor.register_hook(lambda gradient: self._gradient(name, gradient)))

    def _gradient(self, name: str, gradient: torch.Tensor) -> None:
        if self.found is None and math.isfinite(largest := largest_magnitude(gradient)):
            self._before = max(self._before or 0.0, largest)
        elif self.found is None:
            self.found = _report("gradient", name, gradient, self._before)

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def _watched(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """Put hooks on all modules, for the forward pass only: checkpointed layers run again in the backward pass."""
    handles = []
    for path, module in model.named_modules():
        # A 4-bit layer can add its adapter's product itself, so its output is that of the adapted layer.
        name = path.removesuffix(".base") or type(model).__name__

        # Only the first argument: attention masks, which follow it, may hold -inf on purpose.
        def before(_, inputs, name=name):
            watch.look("input", name, inputs[:1], None)

        def after(_, inputs, output, name=name):
            watch.look("output", name, output, inputs[:1])
            watch.follow(f"the output of {name}", output)

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    for name, parameter in model.named_parameters():
        watch.follow(name, parameter)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parameter(model: nn.Module) -> NonFinite | None:
    for path, module in model.named_modules():
        # Codes cannot be bad, as all levels are finite. Their constants can, in a damaged file.
        own = [("weight.absmax", module.weight.absmax)] if isinstance(module, PackedModule) else []
        for name, tensor in [*own, *module.named_parameters(recurse=False)]:
            if not math.isfinite(largest_magnitude(tensor)):
                return _report("parameter", f"{path}.{name}".lstrip("."), tensor, None)
    return None


def _report(kind: str, name: str, tensor: torch.Tensor, largest: float | None) -> NonFinite:
    bad = int((~tensor.isfinite()).sum())  # slow, and done once: for the first bad tensor
    return NonFinite(kind, name, str(tensor.dtype).removeprefix("torch."), bad, tensor.numel(), largest)


def largest_finite(value: Any) -> float | None:
    """The largest finite magnitude in a tensor, or in all tensors of a tuple; None if there is none.

    >>> largest_finite((torch.tensor([1.0, -3.0]), torch.tensor([torch.inf])))
    3.0
    """
    finite = [tensor.detach()[tensor.isfinite()] for tensor in _floats(value)]
    return max((part.abs().max().item() for part in finite if part.numel()), default=None)


def _floats(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors in what a module takes or returns: a tensor, a tuple, a ModelOutput, nested."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _floats(part)]
