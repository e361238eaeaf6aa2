"""Which matrices of one layer have an adapter: the same names and groups as add_lora takes, found from a shape alone.

In: a Shape and a Setup. Out: the linear layers, and the matrices of an expert, each expert having a pair of its own.
Not here: the same choice in a model (adapters/targets.py).
"""

from typing import NamedTuple

from qlora_lab.memory.linear_shape import LinearShape
from qlora_lab.memory.setup import LOW_RANK, Setup
from qlora_lab.memory.shape import Shape

BESIDE_STACKS = ("qlora", "lora", "rslora")  # of LOW_RANK, those that expert_lora.py has a form of
ATTENTION = 4  # q_proj, k_proj, v_proj and o_proj come first in a shape


class Targets(NamedTuple):
    """What learns in one layer, in the model's order."""

    linears: list[LinearShape]
    experts: list[LinearShape]  # the matrices of each expert


def targeted(shape: Shape, setup: Setup) -> Targets:
    """Return what has an adapter.

    Raises ValueError for an unknown target, for a group that the model has none of, and for adapters on experts with a
    method or a dropout that experts cannot take.
    """
    if setup.method not in LOW_RANK:
        return Targets([], [])
    names = [linear.name for linear in shape.linears]
    stacks = [matrix.name for matrix in shape.expert]
    shared = names[ATTENTION:] if shape.experts else []
    groups = {"all-linear": (names, []), "attention": (names[:ATTENTION], [])}
    groups |= {"experts": ([], stacks), "shared-experts": (shared, []), "all": (names, stacks)}
    groups = {group: members for group, members in groups.items() if any(members)}
    # A name alone means linear layers first, as in add_lora: shared experts have a down_proj, too.
    singles = {name: ([], [name]) for name in stacks} | {f"experts.{name}": ([], [name]) for name in stacks}
    singles |= {name: ([name], []) for name in names}
    asked = {setup.targets} if isinstance(setup.targets, str) else set(setup.targets)
    if (unknown := sorted(asked - {*groups, *singles})) or not asked:
        listed = ", ".join([*names, *(f"experts.{name}" for name in stacks)])
        raise ValueError(f"targets {unknown or 'none'}: choose {', '.join(map(repr, groups))} or from {listed}")
    chosen = [(groups | singles)[name] for name in asked]
    linears = {name for members, _ in chosen for name in members}
    experts = {name for _, members in chosen for name in members}
    _check_experts(experts, setup)
    return Targets(
        [linear for linear in shape.linears if linear.name in linears],
        [matrix for matrix in shape.expert if matrix.name in experts],
    )


def _check_experts(experts: set[str], setup: Setup) -> None:
    """Raise ValueError where add_lora would refuse adapters beside experts."""
    fix = "or leave experts out of targets"
    if experts and setup.method not in BESIDE_STACKS:
        raise ValueError(f"method={setup.method!r} cannot adapt experts: choose {', '.join(BESIDE_STACKS)}, {fix}")
    if experts and setup.dropout:
        raise ValueError(f"dropout={setup.dropout} cannot be beside experts: set dropout=0, {fix}")
