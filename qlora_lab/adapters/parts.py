"""The weights that full fine-tuning moves: all of a model, or those of the modules that are named.

In: a model, and ends of paths, such as "multi_modal_projector" for LLaVA's first stage; None: the whole model.
Out: its parameters by name, or an error that says why they cannot learn.
"""

import torch
from torch import nn

from qlora_lab.model.packed_module import PackedModule


def tensors_in(model: nn.Module, parts: tuple[str, ...] | None) -> dict[str, nn.Parameter]:
    """Return name -> parameter of the named modules, in order. Raises ValueError for a name that fits none."""
    named = dict(model.named_parameters())
    if parts == ():
        raise ValueError("parts names no module, so nothing would learn: name one, or leave parts out")
    for part in parts or ():
        if not any(_is_in(name, (part,)) for name in named):
            children = getattr(model, "base_model", model).named_children()  # of transformers' model without its head
            choices = ", ".join(name for name, _ in children)
            raise ValueError(f"no module with weights that can learn is called {part!r}: choose from {choices}")
    return {name: parameter for name, parameter in named.items() if _is_in(name, parts)}


def check_can_learn(model: nn.Module, parts: tuple[str, ...] | None) -> None:
    """Raise ValueError for packed weights among those that would learn, and for a dtype without useful gradients."""
    modules = ((path, module) for path, module in model.named_modules() if _is_in(f"{path}.", parts))
    packed = next((path for path, module in modules if isinstance(module, PackedModule)), None)
    if packed is not None:
        fix = "load it with codebook=None (--codebook none), or train an adapter"
        raise ValueError(f"full fine-tuning moves weights of 16 or 32 bits, but {packed} is packed in 4: {fix}")
    for name, parameter in tensors_in(model, parts).items():
        if not parameter.is_floating_point() or parameter.dtype == torch.float16:
            why = "gradients in float16 overflow" if parameter.is_floating_point() else "it has no gradient"
            raise ValueError(
                f"full fine-tuning needs weights in bf16 or float32, but {name} is {parameter.dtype}: {why}"
            )


def _is_in(name: str, parts: tuple[str, ...] | None) -> bool:
    """Tell whether a tensor belongs to a module whose path ends with one of `parts`."""
    return parts is None or any(f".{part}." in f".{name}" for part in parts)
