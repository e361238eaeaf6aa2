"""Experts whose frozen weights stay packed: only those that a token is routed to are decoded, one panel at a time.

In: hidden states, (tokens, hidden), and for each token k indices of experts and their weights, (tokens, k). Out: the
weighted sum of the k answers, (tokens, hidden), same dtype.
Source: transformers 5.23, integrations/moe.py, whose `grouped_mm` forward this follows: pairs of token and expert are
sorted by expert, each expert multiplies its rows, and the k answers of a token are summed. But a loop over the experts
that are in use replaces one product over all stacks, which would need them decoded.

An expert costs 0.5 byte a weight at rest. While it computes, one panel of it is decoded (kernels/product.py), and
backward decodes it again.
Not here: which modules are experts (experts.py).
"""

import torch
from torch import nn
from torch.nn.functional import linear

from qlora_lab.model.experts import DOWN, GATED, Layout, layout_of, matrices
from qlora_lab.model.linear4bit import product
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.quant.stack import QuantizedStack


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

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """(rows, in_features) -> x W^T of one expert, (rows, out_features)."""
        return product(self.taken(x), self.weight[expert])


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
        self.family = type(experts)  # of which `_apply_gate` is used

    def pack(self, name: str, weight: QuantizedStack) -> None:
        """Replace the parameter `name` by its packed stack."""
        del self._parameters[name]  # first: a module and a parameter of one name would hide each other
        self.add_module(name, Stack4bit(weight, self.layout.turned))

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
        rows = hidden[order // k].split(counts)  # of each expert: (its pairs, hidden)
        answers = [self.answer(x, expert) for expert, x in enumerate(rows) if len(x)]
        # Router weights may be float32 beside 16-bit answers; the sum of k is then float32, too, and rounded once.
        y = torch.cat(answers) * weights.reshape(-1, 1)[order]  # (tokens k, hidden)
        return y[order.argsort()].view(tokens, k, -1).sum(1).to(hidden.dtype)

    def _sorted(self, hidden: torch.Tensor) -> torch.Tensor:
        groups = hidden.view(self.num_experts, -1, hidden.shape[-1])  # (experts, tokens, hidden)
        answers = []
        for expert, x in enumerate(groups):
            used = x.detach().any(-1).nonzero().squeeze(-1)  # rows of zeros: the router chose another expert
            none = torch.zeros_like(x)
            # A row of zeros gives zeros, so leaving it out changes no bit, and an expert without rows is not decoded.
            answers.append(none.index_copy(0, used, self.answer(x[used], expert).to(x.dtype)) if len(used) else none)
        return torch.cat(answers)  # (experts tokens, hidden)

    def answer(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """(rows, hidden) -> (rows, hidden): what one expert makes of its rows."""
        y = self._multiply(self.layout.up, x, expert)
        y = self._gated(y) if self.layout.up == GATED else self.act_fn(y)  # (rows, inner)
        y = self._multiply(DOWN, y, expert)
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    def _gated(self, y: torch.Tensor) -> torch.Tensor:
        if hasattr(self.family, "_apply_gate"):  # GPT-OSS has one of its own
            return self.family._apply_gate(self, y)
        gate, up = y.chunk(2, dim=-1)
        return up * self.act_fn(gate)

    def _multiply(self, name: str, x: torch.Tensor, expert: int) -> torch.Tensor:
        packed = self._modules[name]
        if packed is None:  # only the other stack is packed
            y = linear(x, matrices(self._parameters[name], self.layout.turned)[expert])
        else:
            y = packed(x, expert)
        bias = self._parameters.get(f"{name}_bias")  # (experts, out_features)
        return y if bias is None else y + bias[expert].to(y.dtype)


def pack_stack(model: nn.Module, path: str, weight: QuantizedStack) -> Stack4bit:
    """Put a packed stack in the place of the parameter at `path`, and return the module that holds it."""
    owner, _, name = path.rpartition(".")
    experts = model.get_submodule(owner)
    if not isinstance(experts, Experts4bit):
        experts = Experts4bit(experts)
        model.set_submodule(owner, experts)
    experts.pack(name, weight)
    return getattr(experts, name)
