"""What all adapters have in common: a module with tensors that learn, beside a model that is frozen.

In: a model. Out: its adapters by path, and what they learn by name. Trainer, checkpoints and doctor know no more.
Learned tensors are float32 whatever the model computes in: at lr 2e-4 an update is smaller than one unit in the last
place of a bf16 weight and would be lost.
Not here: the methods (lora.py, houlsby.py, ...), choosing one (add_adapter.py), their files (peft_format.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from qlora_lab.adapters.saving import AdapterSaver
from qlora_lab.model.loaded import check_model
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.model.saving import refuse_to_save


class Adapter(nn.Module):
    """Tensors that learn. What they stand beside is in `base`, if it is one layer."""

    method: ClassVar[str]  # as add_adapter takes it

    def learned(self) -> dict[str, nn.Parameter]:
        """Name -> tensor that learns, in a fixed order."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("base.")}

    def named(self, path: str) -> dict[str, nn.Parameter]:
        """Return the same, with names from the model's root, where this stands at `path`."""
        return {f"{path}.{name}": parameter for name, parameter in self.learned().items()}

    def constants(self) -> dict[str, torch.Tensor]:
        """Name -> tensor that was computed when this was made, and could differ if another machine made it."""
        return dict(self.named_buffers(recurse=False))

    def put_into(self, model: nn.Module, path: str) -> None:
        """Take the place of the base, which is the module `path` of `model`."""
        model.set_submodule(path, self.train(self.base.training))  # a new module would be in training mode

    def take_out(self, model: nn.Module, path: str) -> None:
        """Undo put_into."""
        model.set_submodule(path, self.base)

    def settings(self) -> dict[str, Any]:
        """What the method was given, by the names of add_adapter's options."""
        raise NotImplementedError

    def _apply(self, fn, recurse: bool = True):
        exact = [(p, p.data, None if p.grad is None else p.grad.data) for p in self.learned().values()]
        constants = self.constants()
        super()._apply(fn, recurse)  # may cast
        for parameter, data, grad in exact:  # to another device, but in float32 with the same bits
            if not data.is_meta:
                parameter.grad = None  # torch refuses new data of another dtype than the gradient's
                parameter.data = data.to(parameter.device)
                parameter.grad = None if grad is None else grad.to(parameter.device)
        for name, constant in constants.items():
            setattr(self, name, constant.to(getattr(self, name).device))
        return self


def has_adapters(model: nn.Module) -> bool:
    """Return whether the model has an adapter. Raises TypeError for what is no model: most doors ask this first."""
    check_model(model)
    return any(isinstance(module, Adapter) for module in model.modules())


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return path -> adapter, in the model's order. Raises ValueError if there are none."""
    check_model(model)
    found = {path: module for path, module in model.named_modules() if isinstance(module, Adapter)}
    if not found:
        raise ValueError("this model has no adapter: call qlora_lab.add_adapter(model) first")
    return found


def learned(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> tensor for everything that the adapters of `model` learn."""
    return {name: p for path, adapter in adapters(model).items() for name, p in adapter.named(path).items()}


def method_of(model: nn.Module) -> str:
    """Return the method of the model's adapters, which is one. Raises ValueError if there are none."""
    return next(iter(adapters(model).values())).method


def put_into(model: nn.Module, make: Callable[[], dict[str, Adapter]]) -> nn.Module:
    """Freeze `model` and put adapters into it. make: returns path -> adapter. Returns `model`.

    Raises ValueError for a model that has adapters already, before any is made.
    """
    if has_adapters(model):
        raise ValueError("this model has adapters already: load the model again")
    made = make()  # an error in it leaves the model as it was
    model.requires_grad_(False)  # the adapters are not in it yet
    for path, adapter in made.items():
        adapter.put_into(model, path)
    if method_of(model) != "full":  # transformers can save that
        model.save_pretrained = AdapterSaver(model)
    return model


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Make `model` the base inside the `with` block; afterwards its adapters stand where they stood.

    No weight is copied or moved. Raises ValueError if there are none, or if all weights learned.
    """
    there = adapters(model)
    out = {}  # those that are out by now: one that refuses leaves the others as they were
    try:
        for path, adapter in there.items():
            adapter.take_out(model, path)
            out[path] = adapter
        yield
    finally:
        for path, adapter in out.items():
            adapter.put_into(model, path)


def remove_adapter(model: nn.Module) -> nn.Module:
    """Take the adapters out of `model`, in place, and return it: the base, frozen, with the bits that it had.

    What they learned is lost unless it was saved. Raises ValueError if there are none, or if all weights learned.
    """
    for path, adapter in adapters(model).items():
        adapter.take_out(model, path)
    vars(model).pop("save_pretrained", None)
    if any(isinstance(module, PackedModule) for module in model.modules()):
        refuse_to_save(model)
    return model
