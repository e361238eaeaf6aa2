"""Let each process hold its share of the experts of every layer, and send tokens to the process of their experts.

In: a model with adapters and experts. Out: an engine (distributed.py). Process p of P holds experts p n / P to
(p + 1) n / P - 1 of each stack; all other weights, and all adapters, are whole in each.
Source: GShard (arXiv 2006.16668) section 3.2, with torch's all_to_all_single.

A forward of one layer of experts sends, of T tokens with k experts each, about T k (P - 1) / P rows of the hidden size
to other processes, and the same number of answers back; backward does the same with gradients. Two messages, and one
that counts the rows. An expert computes for all processes at once, so its adapter's gradient is whole where it lies,
and zero elsewhere: the sum over processes, which every engine takes, is right for them, too.
But: the processes wait for each other in every layer of experts, and a popular expert makes all of them wait.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from qlora_lab.adapters.adapter import Adapter
from qlora_lab.adapters.targets import stacks_of_experts
from qlora_lab.model.experts import experts_of
from qlora_lab.model.experts4bit import Stack4bit, put_stack, stack_modules
from qlora_lab.quant.double_quant import DoubleQuantized
from qlora_lab.quant.stack import QuantizedStack
from qlora_lab.train.distributed import Spread


class StackPart(nn.Module):
    """The experts from `first` on of a stack: `base` holds no others. They keep their numbers."""

    def __init__(self, base: nn.Module, first: int):
        super().__init__()
        self.base = base
        self.first = first

    @property
    def weight(self) -> QuantizedStack | nn.Parameter:
        return self.base.weight

    @property
    def takes_adapter(self) -> bool:
        return self.base.takes_adapter

    def forward(self, x: torch.Tensor, expert: int, *adapter: tuple) -> torch.Tensor:
        return self.base(x, expert - self.first, *adapter)


class _Swap(torch.autograd.Function):
    """Send rows to all processes and receive theirs; backward sends the gradients the way back."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, anchor: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        ctx.way_back = received, sent
        return _swapped(x, sent, received)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return _swapped(grad, *ctx.way_back), None, None, None


def _swapped(x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent)
    return out


class Exchange:
    """What an Experts4bit asks for the answers of experts that lie in several processes.

    experts: of the layer, over all processes; rank: of this process, of `size`.
    """

    def __init__(self, experts: int, rank: int, size: int):
        self.experts = experts
        self.size = size
        self.own = experts // size
        self.first = rank * self.own

    def __call__(self, x: torch.Tensor, counts: list[int], answers: Callable) -> torch.Tensor:
        """x: (rows, hidden), sorted by expert, counts[e] of them for expert e. Returns their answers, (rows, hidden).

        answers: what this process computes, from rows and counts of the same kind.
        """
        out = torch.tensor(counts, dtype=torch.int64, device=x.device)
        out = out.view(self.size, self.own)  # (to process, its expert)
        here = torch.empty_like(out)  # (from process, own expert)
        dist.all_to_all_single(here, out)
        sent, received = out.sum(1).tolist(), here.sum(1).tolist()
        # A process that gets no rows must still send gradients of none, or the others would wait for it without end:
        # so each exchange is part of the graph on all of them.
        anchor = torch.empty(0, dtype=torch.float32, device=x.device, requires_grad=True)
        rows = _Swap.apply(x, anchor, sent, received)
        expert = torch.arange(self.own, device=x.device).repeat(self.size).repeat_interleave(here.flatten())
        order = expert.argsort(stable=True)  # rows come by process; an expert takes those of all at once
        whole = [0] * self.experts
        whole[self.first : self.first + self.own] = here.sum(0).tolist()
        y = answers(rows[order], whole).to(x.dtype)  # under autocast answers are narrower, and nothing answers nothing
        return _Swap.apply(y[order.argsort()], anchor, received, sent)


class ExpertParallel(Spread):
    """Raises ValueError for a model without experts, and for a number of them that the processes cannot share."""

    def __init__(self, model: nn.Module):
        check_experts(model, dist.get_world_size())
        super().__init__(model)
        self._bases: dict[str, nn.Module] = {}  # path of a stack -> what holds a part of it
        try:
            for path, base in stacks_of_experts(model).items():
                self._spread(path, base)
        except BaseException:
            self.close()
            raise

    def _spread(self, path: str, base: nn.Module) -> None:
        exchange = Exchange(len(base.weight), self.rank, self.size)
        own = slice(exchange.first, exchange.first + exchange.own)
        # In place, because adapters of a bank that the model does not use know this base, too.
        _set_weight(base, _with_parts(base.weight, lambda part: part[own].clone()))
        self._bases[path] = base
        self._put(path, StackPart(base, exchange.first))
        self.model.get_submodule(path.rpartition(".")[0]).exchange = exchange

    def _put_together(self) -> None:
        for path, base in self._bases.items():
            device = base.weight.device
            whole = _with_parts(base.weight, lambda part, device=device: self._gather(part.cpu()).to(device))
            _set_weight(base, whole)
            self.model.get_submodule(path.rpartition(".")[0]).exchange = None
            self._put(path, base)

    def _let_go(self) -> None:
        self._bases = {}

    def _put(self, path: str, stack: nn.Module) -> None:
        standing = stack_modules(self.model)[path]
        if isinstance(standing, Adapter):
            standing.base = stack
        else:
            put_stack(self.model, path, stack)


def check_experts(model: nn.Module, processes: int) -> None:
    """Raise ValueError for a model whose experts cannot be spread over so many processes."""
    found = experts_of(model)
    if not found:
        raise ValueError(
            f"expert_parallel spreads experts, but {type(model).__name__} has none in one tensor: leave it out, or use "
            "shard (--shard)"
        )
    for path, experts in found.items():
        if experts.num_experts % processes:
            raise ValueError(
                f"expert_parallel needs the same number of experts in each process, but {path} has "
                f"{experts.num_experts} experts for {processes} processes: start a number of them that divides "
                f"{experts.num_experts}"
            )


def _with_parts(weight: QuantizedStack | nn.Parameter, change: Callable) -> QuantizedStack | torch.Tensor:
    """Return `weight` with every tensor changed that begins with the dimension of experts."""
    if not isinstance(weight, QuantizedStack):
        return change(weight.data)
    constants = weight.constants
    constants = DoubleQuantized(*map(change, vars(constants).values())) if weight.double_quant else change(constants)
    packed = change(weight.packed)
    return replace(weight, packed=packed, constants=constants, shape=torch.Size([len(packed), *weight.shape[1:]]))


def _set_weight(base: nn.Module, weight: QuantizedStack | torch.Tensor) -> None:
    if isinstance(base, Stack4bit):
        base.weight = weight
    else:
        base.weight.data = weight
