"""Find the experts of a mixture by their structure: stacks of matrices, 3-D parameters, in one module of a layer.

In: a model of transformers, in 4 bits or not. Out: which parameters are stacks, which way their matrices lie, and which
linear layers beside them are routers and gates.
Source: transformers 5.23, integrations/moe.py, whose decorator gives a module of experts the attributes read here; it
covers some 60 families. Llama 4's has none of them and is told by its shapes.
Not here: what computes with packed stacks (experts4bit.py).
"""

import inspect
from typing import NamedTuple

import torch
from torch import nn

GATED = "gate_up_proj"  # gate and up in one matrix
UP = (GATED, "up_proj")  # or up alone, as in Nemotron-H
DOWN = "down_proj"
ROUTER = "router"  # in the paths of most, whatever class they are
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # names of n in configurations
DECORATED = ("is_transposed", "has_gate", "has_bias")  # what the decorator sets


class Layout(NamedTuple):
    """How a module keeps its experts."""

    up: str  # the name of the first stack; the second is DOWN
    turned: bool  # a matrix is (in_features, out_features), as in GPT-OSS
    sorted: bool  # each expert is given rows of its own, zeros where it is not chosen; else tokens come with indices


def layout_of(module: nn.Module) -> Layout | None:
    """Return how `module` keeps its experts, or None if it keeps none in a way that is known here."""
    if layout := getattr(module, "layout", None):  # an Experts4bit knows
        return layout if isinstance(layout, Layout) else None
    up, down = (module._parameters.get(name) for name in (_up_of(module), DOWN))
    if not all(_is_stack(weight) for weight in (up, down)):
        return None
    if not len(up) == len(down) == getattr(module, "num_experts", None):
        return None  # LongCat has experts without matrices
    # Shapes cannot tell which way a square matrix lies, so the decorator's word counts where there is one.
    if all(hasattr(module, name) for name in DECORATED):
        return Layout(_up_of(module), module.is_transposed, sorted=False)
    # Without indices, rows must come sorted: the module is told in no other way which expert a row belongs to.
    takes = list(inspect.signature(type(module).forward).parameters)[1:]
    # (n, d, 2 f) and (n, f, d): for the other layout, f would have to be d and 2 d at once
    lies_turned = up.shape[1] == down.shape[2] and up.shape[2] == 2 * down.shape[1]
    if len(takes) == 1 and lies_turned and _skips_zeros(module):
        return Layout(_up_of(module), turned=True, sorted=True)
    return None


def _up_of(module: nn.Module) -> str:
    return next((name for name in UP if name in module._parameters), UP[0])


def _is_stack(weight: torch.Tensor | None) -> bool:
    return weight is not None and weight.dim() == 3 and weight.is_floating_point()


def _skips_zeros(module: nn.Module) -> bool:
    """Tell whether a row of zeros gives zeros and a gradient of zeros, so that it need not be computed."""
    # act(gate) * up has the factor up = 0, so it is 0; its gradient has act(0), which is 0 for SiLU, GELU and ReLU.
    act = getattr(module, "act_fn", None)
    return callable(act) and float(act(torch.zeros(1, dtype=torch.float32))) == 0


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module of experts."""
    return {path: module for path, module in model.named_modules() if layout_of(module)}


def stacks_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return path -> stack, (experts, ., .) as the family keeps it, for those that are not packed yet."""
    return {
        f"{path}.{name}": module._parameters[name]
        for path, module in experts_of(model).items()
        for name in (layout_of(module).up, DOWN)
        if name in module._parameters
    }


def is_stack(model: nn.Module, path: str) -> bool:
    """Tell whether `path` is a stack of `model`, packed or not."""
    owner, _, name = path.rpartition(".")
    layout = layout_of(model.get_submodule(owner))
    return layout is not None and name in (layout.up, DOWN)


def matrices(weight: torch.Tensor, turned: bool) -> torch.Tensor:
    """Return a stack as (experts, out_features, in_features), a view; the same way back."""
    return weight.transpose(1, 2) if turned else weight


def gates(model: nn.Module) -> set[str]:
    """Return paths of linear layers that choose or weigh experts: they have an output for each expert, or one.

    Where experts are not known, a router is told by its name or by the configuration's number of experts.
    They are small, and an error in them sends a token elsewhere, so they keep their precision.
    """
    found = set()
    # Qwen2-MoE's shared_expert_gate has one output. Routers of transformers 5 are classes of their own, mostly; a plain
    # layer with an output for each expert is one all the same.
    for path, experts in experts_of(model).items():
        block = path.rpartition(".")[0]
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            beside = not name.startswith(f"{path}.")
            if beside and isinstance(module, nn.Linear) and module.out_features in (1, experts.num_experts):
                found.add(name)
    # LongCat-Flash and JetMoE keep experts in ways that are not known here, and their routers are plain layers.
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    counts = set() if experts_of(model) else {getattr(config, name, None) for name in COUNTS} - {1}
    return found | {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and (ROUTER in path or module.out_features in counts)
    }
