"""Spread the bytes of all frozen weights over the processes; each gathers a decoder layer when it computes.

In: a model with adapters. Out: an engine (distributed.py). torch's FSDP2 gathers a layer before each forward and
backward pass of a micro-batch, and frees it afterwards (torch 2.7). Adapters stay whole: they are small.
Source: torch.distributed.fsdp.fully_shard, over the packed bytes of each Linear4bit.
Not covered: packed stacks of experts, which stay whole; expert_parallel.py spreads those.
"""

import gc
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace

import torch
import torch.distributed as dist
from torch import nn

from qlora_lab.kernels.packed_weight import PackedWeight
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.quant.quantize import QuantizedTensor
from qlora_lab.train.distributed import Spread


class _Gathered(QuantizedTensor):
    """A weight whose `packed` is memory that FSDP2 fills before a layer runs, and takes back after it."""

    @property
    def plain(self) -> PackedWeight:
        # Never kept, because the memory moves. A second tensor over the same memory, because numpy, through which
        # kernels on the CPU read, forbids for good that its tensor changes size, and FSDP2 must change it.
        packed = self.packed.detach()
        packed = torch.from_dlpack(packed) if packed.device.type == "cpu" else packed
        constants = self.constants.plain if self.double_quant else self.constants
        return PackedWeight(packed, constants, self.levels, self.block_size)


class _Linear4bitShard(Linear4bit):
    """A Linear4bit whose packed bytes are a frozen Parameter, because FSDP2 spreads nothing else.

    Constants stay whole: 1/32 of the packed bytes with double quantization at block size 64, 1/8 without it.
    """

    def __init__(self, layer: Linear4bit):
        nn.Module.__init__(self)
        self.register_parameter("bias", layer.bias)
        self.packed = nn.Parameter(layer.weight.packed, requires_grad=False)
        rest = {field.name: getattr(layer.weight, field.name) for field in fields(QuantizedTensor)}
        self._rest = _Gathered(**rest | {"packed": None})
        self.turned = layer.turned
        self.train(layer.training)

    @property
    def weight(self) -> _Gathered:
        return replace(self._rest, packed=self.packed)


class Sharded(Spread):
    # FSDP2 changes the class, the hooks and the parameters of what it shards, for good. So it gets a copy of the
    # modules, which shares adapters and buffers with the original, whose frozen weights are empty until `close`.

    def __init__(self, model: nn.Module):
        super().__init__(model)
        # Each shard, and what puts the whole back.
        self._whole: list[tuple[torch.Tensor, Callable[[torch.Tensor], None]]] = []
        # one dimension: every process has an equal part of each weight
        mesh = dist.device_mesh.init_device_mesh(next(model.parameters()).device.type, (self.size,))
        self.model = _copy_of_modules(model)
        try:
            self._spread(model, mesh)
        except BaseException:
            self.close()
            raise

    def _spread(self, model: nn.Module, mesh: dist.DeviceMesh) -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        stay = {p for p in model.parameters() if p.requires_grad or not p.dim()}  # FSDP2 takes no scalars
        for path in [*_layers(model), ""]:  # the last is all that is in no layer: embeddings, the last norm, the head
            original = model.get_submodule(path)
            copy = self.model.get_submodule(path)
            frozen = {n: p for n, p in copy.named_parameters() if p not in stay and not isinstance(p, DTensor)}
            fully_shard(copy, mesh=mesh, ignored_params=stay)
            for name, p in frozen.items():
                fill = _filler(original, name, p)
                self._whole.append((copy.get_parameter(name), fill))
                fill(p.new_empty(0))  # from here on this process has its shard only

    def _put_together(self) -> None:
        for shard, fill in self._whole:
            fill(self._whole_of(shard))

    def _let_go(self) -> None:
        self.model = self._original
        self._whole = []
        gc.collect()  # FSDP2's objects hold each other, and with them the shards

    def _whole_of(self, shard: torch.Tensor) -> torch.Tensor:
        """The whole of a tensor that is cut along its first dimension, on the shard's device."""
        mine = shard.to_local()  # (rows of this process, ...)
        length = -(-len(shard) // self.size)  # the last processes may have fewer rows
        part = torch.zeros(length, *shard.shape[1:], dtype=shard.dtype)
        part[: len(mine)] = mine
        return self._gather(part)[: len(shard)].to(mine.device, copy=True)  # without the padding


def _copy_of_modules(model: nn.Module) -> nn.Module:
    """A copy of every module, around the very tensors of the original."""
    same = [*model.parameters(), *model.buffers()]  # tensors that the copy shares
    quantised = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    same += [layer.weight for layer in quantised.values()]
    copy = deepcopy(model, {id(tensor): tensor for tensor in same})
    for name, layer in quantised.items():
        copy.set_submodule(name, _Linear4bitShard(layer))
    return copy


def _layers(model: nn.Module) -> list[str]:
    """Paths of the members of the outermost module lists: decoder layers. A list inside one may not run as a whole."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [f"{name}.{i}" for name in outermost for i in range(len(model.get_submodule(name)))]


def _filler(original: nn.Module, name: str, parameter: nn.Parameter) -> Callable[[torch.Tensor], None]:
    """A function that gives the frozen tensor `name` of the original new contents."""
    path, _, leaf = name.rpartition(".")
    module = original.get_submodule(path)
    # Two functions, because a single one would hold `parameter`, and with it the whole of a packed weight.
    if leaf == "packed" and isinstance(module, Linear4bit):

        def fill(contents: torch.Tensor) -> None:
            module.weight = replace(module.weight, packed=contents)
    else:

        def fill(contents: torch.Tensor) -> None:
            parameter.data = contents

    return fill
