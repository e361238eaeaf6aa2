"""LoRA beside a stack of experts: each has a pair of its own, and only those that get tokens compute.

    y_e = base_e(x) + scaling * x A_e^T B_e^T,   for the rows x of expert e

In: x, (rows, in_features), and the number of an expert. Out: (rows, out_features). lora_A: (experts, r, in_features),
lora_B: (experts, out_features, r), float32.
Source: LoRA (arXiv 2106.09685) section 4.1, once for each matrix; PEFT 0.21 adapts experts by the same equation.
The cost is that of the experts, not of the tokens: 128 experts have 128 times the adapters of one, and their gradients
and moments.
Not here: which stacks (targets.py), their form in files (peft_parameters.py).
"""

import torch
from torch import nn

from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.adapters.rslora import RsLoRALinear
from qlora_lab.model.experts4bit import Multiply, Stack4bit, put_stack
from qlora_lab.model.linear4bit import is_linear


class LoRAStack(LoRALinear):
    """`base`, a stack of experts as experts4bit.py has it, with a pair A and B for each expert.

    Only experts with rows compute. The gradient covers all of them, with zeros for the others: so AdamW moves those,
    too, by its moments of earlier steps.
    """

    def opened(self) -> Multiply:
        """Return what multiplies the rows of an expert, for one forward of all experts."""
        # Once a forward. Backward of A[expert] makes a gradient as large as A, mostly zeros, for every expert in use;
        # that of unbind makes one for all of them.
        A, B = self.lora_A.unbind(), self.lora_B.unbind()
        return lambda x, expert: self._adapted(x, expert, A[expert], B[expert])

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """(rows, in_features) -> (rows, out_features) of one expert."""
        return self.opened()(x, expert)

    def _adapted(self, x: torch.Tensor, expert: int, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        if self.base.takes_adapter and A.dtype == B.dtype == torch.float32:
            return self.base(x, expert, (A, B, self.scaling))
        low = x @ A.to(x.dtype).t() * self.scaling  # (rows, in) @ (in, r) -> (rows, r)
        return self.base(x, expert) + low @ B.to(x.dtype).t()  # (rows, r) @ (r, out) -> (rows, out)

    def change(self, weight: torch.Tensor, rows: slice = slice(None), expert: int = 0) -> torch.Tensor:
        """As of a linear layer, for the matrix of one expert."""
        return (self.lora_B[expert, rows] @ self.lora_A[expert]).mul_(self.scaling).to(weight.device)

    def put_into(self, model: nn.Module, path: str) -> None:
        """Take the place of the base, a module or a parameter."""
        put_stack(model, path, self.train(self.base.training))

    def take_out(self, model: nn.Module, path: str) -> None:
        """Undo put_into: what was a parameter is one again, and its module the family's own."""
        put_stack(model, path, self.base)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if isinstance(self.base, Stack4bit):  # its codes have the base's very path, as in Experts4bit
            state_dict = self.base.take(state_dict, f"{prefix}base", *rest)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class RsLoRAStack(LoRAStack):
    """The same with the scaling of rslora.py."""

    method = RsLoRALinear.method
    flags = RsLoRALinear.flags
    divisor = staticmethod(RsLoRALinear.divisor)


def kind_beside(layer: nn.Module, kind: type[LoRALinear], dropout: float) -> type[LoRALinear]:
    """Return what adapts `layer`: `kind` itself beside a linear layer, and what does the same beside a stack.

    Raises ValueError for a method that cannot, and for dropout: PEFT, which reads the files, adds B A to the weight and
    so cannot drop inputs.
    """
    if is_linear(layer):
        return kind
    kinds = {LoRALinear: LoRAStack, RsLoRALinear: RsLoRAStack}
    if kind not in kinds:
        raise ValueError(
            f"{kind.method} cannot adapt experts in one tensor: use lora or rslora, or leave experts out of targets"
        )
    if dropout:
        raise ValueError(
            f"dropout is {dropout}, but PEFT has none beside experts in one tensor: set dropout=0, or leave experts "
            "out of targets"
        )
    return kinds[kind]
