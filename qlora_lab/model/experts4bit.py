"""Experts whose frozen weights stay packed: only those that a token is routed to are decoded, one panel at a time.

In: hidden states, (tokens, hidden), and for each token k indices of experts and their weights, (tokens, k). Out: the
weighted sum of the k answers, (tokens, hidden), same dtype.
Source: transformers 5.23, integrations/moe.py, whose `grouped_mm` forward this follows: pairs of token and expert are
sorted by expert, each expert multiplies its rows, and the k answers of a token are summed. But a loop over the experts
that are in use replaces one product over all stacks, which would need them decoded.

An expert costs 0.5 byte a weight at rest. While it computes, one panel of it is decoded (kernels/product.py), and
backward decodes it again.
Not here: which modules are experts (experts.py), adapters beside stacks (adapters/expert_lora.py), experts that lie in
several processes (train/expert_parallel.py).
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import linear

from qlora_lab.model import product_4bit
from qlora_lab.model.experts import DOWN, GATED, Layout, experts_of, layout_of, matrices
from qlora_lab.model.linear4bit import product
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.quant.stack import QuantizedStack

Multiply = Callable[[torch.Tensor, int], torch.Tensor]  # (rows, in_features), expert -> (rows, out_features)


class Stack4bit(PackedModule):
    """A packed stack, (experts, out_features, in_features), in the place and under the name of a 3-D parameter.

    turned: the family's own parameter is (experts, in_features, out_features).
    """

    def __init__(self, weight: QuantizedStack, turned: bool = False):
        super().__init__(weight)
        self.turned = turned

    @staticmethod
    def key(prefix: str) -> str:
        return prefix.removesuffix(".")  # the parameter had the path that the module has now

    def _load_from_state_dict(self, *_):
        # Torch hands over the keys below this module's path, but the codes have that very path: Experts4bit loads them.
        pass

    @property
    def out_features(self) -> int:
        return self.weight.shape[1]

    @property
    def in_features(self) -> int:
        return self.weight.shape[2]

    @property
    def takes_adapter(self) -> bool:
        """Whether forward can add an adapter itself, as the CPU's product can."""
        return self.weight.device.type == "cpu" and product_4bit.product_of(self.weight[0]) is not None

    def forward(self, x: torch.Tensor, expert: int, adapter: tuple | None = None) -> torch.Tensor:
        """(rows, in_features) -> x W^T of one expert, (rows, out_features). adapter: as in Linear4bit."""
        return product(self.taken(x), self.weight[expert], adapter)


class PlainStack(nn.Module):
    """A stack that is not quantised, as a module, so that an adapter can stand in its place.

    weight: the family's own parameter, which is shared. turned: as in Stack4bit.
    """

    takes_adapter = False  # torch's product has no place for one

    def __init__(self, weight: nn.Parameter, turned: bool):
        super().__init__()
        self.weight = weight
        self.turned = turned

    @property
    def out_features(self) -> int:
        return self.weight.shape[2 if self.turned else 1]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1 if self.turned else 2]

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """(rows, in_features) -> x W^T of one expert, (rows, out_features)."""
        return linear(x, matrices(self.weight, self.turned)[expert])


class Experts4bit(nn.Module):
    """A module of experts of any family that experts.py knows. Its stacks are packed, or still parameters.

    experts: the family's own module. Its attributes, biases and gate function are taken over, and it is not used again.
    """

    def __init__(self, experts: nn.Module):
        super().__init__()
        for name, value in vars(experts).items():
            vars(self)[name] = value.copy() if isinstance(value, dict) else value  # its dicts of parameters and modules
        self.layout: Layout = layout_of(experts)
        # Places for both stacks: the order of modules must not depend on that in which files hold them (base_checksum).
        self._modules = {self.layout.up: None, DOWN: None} | self._modules
        self.family = type(experts)  # for its `_apply_gate`
        self.exchange: Callable | None = None  # asks other processes for answers (train/expert_parallel.py)

    def put(self, name: str, stack: nn.Module) -> None:
        """Let the module `stack` multiply in the place of the stack `name`, a parameter or a module."""
        self._parameters.pop(name, None)  # a module and a parameter of one name would hide each other
        self._modules[name] = stack

    def put_back(self, name: str, weight: nn.Parameter) -> None:
        """Let the stack `name` be the family's own parameter again."""
        self._modules[name] = None
        self._parameters[name] = weight

    def as_family(self) -> nn.Module:
        """Return the family's own module if every stack is a parameter again, else this one."""
        places = (self.layout.up, DOWN)
        if any(self._modules[name] is not None for name in places):
            return self
        experts = self.family.__new__(self.family)  # without __init__, which would draw weights
        own = ("layout", "family", "exchange")
        vars(experts).update({name: value for name, value in vars(self).items() if name not in own})
        vars(experts)["_modules"] = {name: m for name, m in self._modules.items() if name not in places}
        return experts

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name, module in self._modules.items():
            if isinstance(module, Stack4bit):
                state_dict = module.take(state_dict, f"{prefix}{name}", *rest)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, hidden: torch.Tensor, index: torch.Tensor | None = None, weights: torch.Tensor | None = None):
        """index, weights: (tokens, k); without them hidden holds the rows of each expert, one expert after another."""
        return self._sorted(hidden) if self.layout.sorted else self._routed(hidden, index, weights)

    def _routed(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        tokens, k = index.shape
        if not tokens:
            return torch.zeros_like(hidden)
        chosen = index.reshape(-1)  # (tokens k,): the expert of each pair
        order = chosen.argsort(stable=True)
        # On a GPU this waits for the router, once a layer: Python's loop must know which experts are in use.
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        # Router weights may be float32 beside 16-bit answers; the sum of k is then float32, too, and rounded once.
        y = self.answers(hidden[order // k], counts) * weights.reshape(-1, 1)[order]  # (tokens k, hidden)
        return y[order.argsort()].view(tokens, k, -1).sum(1).to(hidden.dtype)

    def _sorted(self, hidden: torch.Tensor) -> torch.Tensor:
        groups = hidden.detach().view(self.num_experts, -1, hidden.shape[-1])  # (experts, tokens, hidden)
        used = groups.any(-1)  # (experts, tokens); rows of zeros: the router chose another expert
        places = used.flatten().nonzero().squeeze(-1)
        # A row of zeros gives zeros, so leaving it out changes no bit, and an expert without rows is not decoded.
        y = self.answers(hidden[places], used.sum(1).tolist()).to(hidden.dtype)
        return torch.zeros_like(hidden).index_copy(0, places, y)  # (experts tokens, hidden)

    def answers(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """(rows, hidden), the first counts[0] for expert 0, and so on -> (rows, hidden), in that order."""
        return self.exchange(x, counts, self._computed) if self.exchange else self._computed(x, counts)

    def _computed(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        up, down = (self._opened(name) for name in (self.layout.up, DOWN))
        answers = [self._answer(rows, expert, up, down) for expert, rows in enumerate(x.split(counts)) if len(rows)]
        return torch.cat(answers) if answers else x  # without rows as it came, so that gradients have a way through

    def _answer(self, x: torch.Tensor, expert: int, up: Multiply, down: Multiply) -> torch.Tensor:
        """(rows, hidden) -> (rows, hidden): what one expert makes of its rows."""
        y = self._biased(self.layout.up, up(x, expert), expert)
        y = self._gated(y) if self.layout.up == GATED else self.act_fn(y)  # (rows, inner)
        y = self._biased(DOWN, down(y, expert), expert)
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    def _gated(self, y: torch.Tensor) -> torch.Tensor:
        if hasattr(self.family, "_apply_gate"):  # GPT-OSS has one of its own
            return self.family._apply_gate(self, y)
        gate, up = y.chunk(2, dim=-1)
        return up * self.act_fn(gate)

    def _opened(self, name: str) -> Multiply:
        """Return what multiplies by the stack `name`, for one forward of all experts."""
        stack = self._modules[name]
        if stack is None:  # only the other stack is packed, or adapted
            weight = matrices(self._parameters[name], self.layout.turned)
            return lambda x, expert: linear(x, weight[expert])
        # An adapter hands out the tensors of all experts once, so that backward makes one gradient for all of them.
        return stack.opened() if hasattr(stack, "opened") else stack

    def _biased(self, name: str, y: torch.Tensor, expert: int) -> torch.Tensor:
        bias = self._parameters.get(f"{name}_bias")  # (experts, out_features)
        return y if bias is None else y + bias[expert].to(y.dtype)


def pack_stack(model: nn.Module, path: str, weight: QuantizedStack) -> Stack4bit:
    """Put a packed stack in the place of the parameter at `path`, and return the module that holds it."""
    experts = model.get_submodule(path.rpartition(".")[0])
    stack = Stack4bit(weight, layout_of(experts).turned)
    put_stack(model, path, stack)
    return stack


def put_stack(model: nn.Module, path: str, stack: nn.Module) -> None:
    """Let the module `stack` multiply in the place of the stack at `path`. A PlainStack becomes a parameter again."""
    owner, _, name = path.rpartition(".")
    experts = model.get_submodule(owner)
    if not isinstance(experts, Experts4bit):
        experts = Experts4bit(experts)
        model.set_submodule(owner, experts)
    if isinstance(stack, PlainStack):
        experts.put_back(name, stack.weight)
        model.set_submodule(owner, experts.as_family())
    else:
        experts.put(name, stack)


def stack_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> what multiplies by each stack: the module that stands there, or a PlainStack of the parameter."""
    found = {}
    for path, experts in experts_of(model).items():
        layout = layout_of(experts)
        for name in (layout.up, DOWN):
            own = experts._modules.get(name)
            found[f"{path}.{name}"] = PlainStack(experts._parameters[name], layout.turned) if own is None else own
    return found
