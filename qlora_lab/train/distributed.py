"""Divide the work of a run: one process, or several that share the rows of each step and, if asked, the base.

In: a model with adapters. Out: an engine, whose `model` the loop calls for a loss. Each process has:
    OneProcess    all rows, all weights
    DataParallel  its share of the rows, all weights; torch's DDP adds up the adapters' gradients, once per step
    Sharded       its share of the rows, and of the bytes of each frozen weight; torch's FSDP2 gathers a decoder layer
                  before each forward and backward pass of a micro-batch, and frees it afterwards (torch 2.7)
Each process has whole adapters, gradients and optimizer state: they are small, and so clipping, paging and checkpoints
need no second form. The loss is a sum over all rows of a step, so gradients are summed and never averaged.

`torchrun` starts the processes and numbers them in environment variables, which `processes` reads.
Not covered: tensor and pipeline parallelism, adapters or optimizer state in shards.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import fields, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from qlora_lab.adapters.adapter import Adapter
from qlora_lab.kernels.packed_weight import PackedWeight
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.quant.quantize import QuantizedTensor

WAIT = timedelta(minutes=30)  # for another process, which may be testing the model meanwhile
LATE = timedelta(seconds=20)  # at the end of a run, which all processes reach at once; a later one has failed
T = TypeVar("T")


class OneProcess:
    """A run in one process. model: what the loop calls for a loss; rank: of this process, of `size`."""

    rank = 0
    size = 1

    def __init__(self, model: nn.Module):
        self.model = model

    def gradients(self, last: bool) -> AbstractContextManager:
        """The context for forward and backward of a micro-batch; after the last, `finish` completes the gradients."""
        return nullcontext()

    def finish(self, parameters: list[nn.Parameter]) -> None:
        """Turn the gradients of this process's rows into those of all rows."""

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """Each number summed over all processes."""
        return numbers

    def agree(self, facts: dict[str, Any]) -> None:
        """Raise ValueError on all processes unless all have the same facts."""

    def close(self) -> None:
        """Leave the model as it was before the run: `model` is the original again, and nothing is shared."""


class _Several(OneProcess):
    """What both kinds of run with several processes share. The adapters of process 0 become those of all."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._original = model
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        made = [module for module in model.modules() if isinstance(module, Adapter)]
        shared = [p.data for p in model.parameters() if p.requires_grad]
        shared += [constant for adapter in made for constant in adapter.constants().values()]
        flat = torch.cat([tensor.reshape(-1) for tensor in shared])
        dist.broadcast(flat, src=0)  # one message for all adapters
        _spread_out(flat, shared)

    def sum(self, *numbers: float) -> tuple[float, ...]:
        return _sum(*numbers)

    def agree(self, facts: dict[str, Any]) -> None:
        everyone: list[dict[str, Any]] = [{}] * self.size
        dist.all_gather_object(everyone, facts)
        first = everyone[0]
        for rank, theirs in enumerate(everyone):
            differing = [name for name in facts if theirs[name] != first[name]]
            lines = [f"{name}: {first[name]!r:.80} and {theirs[name]!r:.80}" for name in differing]
            if lines:
                raise ValueError(
                    f"processes 0 and {rank} do not work on the same run, {'; '.join(lines)}: "
                    "give all of them the same model, dtype, data, options and folder"
                )

    def close(self) -> None:
        self.model = self._original


class _Replica(nn.parallel.DistributedDataParallel):
    """DDP around a model of transformers, with the one method of that model which the loss calls."""

    def get_output_embeddings(self) -> nn.Module:
        return self.module.get_output_embeddings()


class DataParallel(_Several):
    def __init__(self, model: nn.Module):
        super().__init__(model)
        # Without a search for unused parameters DDP forms other buckets after its first step: from three processes on a
        # resumed run would add up in another order than one that was not interrupted.
        self.model = _Replica(model, init_sync=False, find_unused_parameters=True)
        self.model.broadcast_buffers = False  # they are constants; the constructor's argument is deprecated
        self.model.register_comm_hook(None, _summed)

    def gradients(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.model.no_sync()


def _summed(_, bucket):
    """DDP's own hook divides by the number of processes, but each loss was divided by all answer tokens already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)  # while backward goes on
    return work.get_future().then(lambda future: future.value()[0])


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


class Sharded(_Several):
    # FSDP2 changes the class, the hooks and the parameters of what it shards, for good. So it gets a copy of the
    # modules, which shares adapters and buffers with the original, whose frozen weights are empty until `close`.

    def __init__(self, model: nn.Module):
        super().__init__(model)
        # Connections of its own, so that the end of a run never meets messages that an error left under way.
        self._apart = dist.new_group(backend="gloo", timeout=WAIT)
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

    def finish(self, parameters: list[nn.Parameter]) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients])  # one message instead of hundreds
        dist.all_reduce(flat)
        _spread_out(flat, gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    @torch.no_grad()
    def close(self) -> None:
        if self.model is self._original:  # closed before: after an error a run closes it, and then engine_for does
            return
        try:
            dist.monitored_barrier(self._apart, timeout=LATE)
            for shard, fill in self._whole:
                fill(self._gather(shard))
        except RuntimeError as error:
            raise RuntimeError(
                "not all processes reached the end, so the base is still spread over them: load the model again"
            ) from error
        finally:
            self.model = self._original
            self._whole = []
            gc.collect()  # FSDP2's objects hold each other, and with them the shards
            dist.destroy_process_group(self._apart)

    def _gather(self, shard: torch.Tensor) -> torch.Tensor:
        """The whole of a tensor that is cut along its first dimension, on the shard's device."""
        mine = shard.to_local()  # (rows of this process, ...)
        length = -(-len(shard) // self.size)  # the last processes may have fewer rows
        part = torch.zeros(length, *shard.shape[1:], dtype=shard.dtype)
        part[: len(mine)] = mine
        whole = torch.empty(length * self.size, *shard.shape[1:], dtype=shard.dtype)
        dist.all_gather(list(_bytes(whole).split(part.nbytes)), _bytes(part), group=self._apart)
        return whole[: len(shard)].to(mine.device, copy=True)  # without the padding


@contextmanager
def engine_for(model: nn.Module, shard: bool = False) -> Iterator[OneProcess]:
    """The engine for all processes of torch's process group; OneProcess where there is none or only one.

    shard: spread the frozen weights over the processes. Afterwards, even after an error, the model is as it was.
    Raises ValueError for `shard` with one process.
    """
    check_shard(shard)
    engine = (Sharded if shard else DataParallel)(model) if _joined() else OneProcess(model)
    try:
        yield engine
    except BaseException as error:
        try:
            engine.close()
        except RuntimeError as left:
            error.add_note(str(left))
        raise
    engine.close()


def check_shard(shard: bool) -> None:
    """Raise ValueError for `shard` in a single process."""
    if shard and not _joined():
        raise ValueError(
            "shard spreads the weights over processes, but this is the only one: start several with "
            "`torchrun --nproc-per-node N -m -- qlora_lab.cli finetune ... --shard`, or leave it out"
        )


@contextmanager
def processes() -> Iterator[int]:
    """Join the processes that torchrun started while the `with` block lasts; yields the rank of this one.

    NCCL where there is a GPU for each process of the node, else gloo. Without torchrun nothing is joined.
    Raises ValueError for more processes on a node than it has GPUs, if it has any.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0
        return
    local = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count()
    if gpus:
        if local >= gpus:
            raise ValueError(f"process {local} of this node has no GPU, there are {gpus}: --nproc-per-node {gpus}")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if gpus else "gloo", timeout=WAIT)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


@contextmanager
def failing_together() -> Iterator[None]:
    """Let all processes leave the `with` block together; an error on one of them is an error on all.

    Raises what the block raises, and ConnectionAbortedError where another process raised.
    """
    if not _joined():
        yield
        return
    try:
        yield
    except Exception:  # of any kind, because it is raised again; not an interrupt, whose signal all get
        _sum(1.0)  # report it to the others, who wait below
        raise
    if _sum(0.0)[0]:
        raise ConnectionAbortedError("another process failed here, so this one stops as well; its message says why")


def is_process_0() -> bool:
    return not _joined() or dist.get_rank() == 0


def on_process_0(work: Callable[[], object]) -> None:
    """work() on process 0, which writes files, while the others wait; its error is an error on all."""
    with failing_together():
        if is_process_0():
            work()


def first_on_node(work: Callable[[], T]) -> T:
    """work() on the first process of each node, and then on the others, which find what it fetched."""
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    with failing_together():
        result = work() if is_first else None
    return result if is_first else work()


def from_process_0(value: T) -> T:
    """The value that process 0 has, on all processes."""
    if not _joined():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _sum(*numbers: float) -> tuple[float, ...]:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # NCCL sends from GPUs alone
    # float64, so that token counts stay exact
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return tuple(total.tolist())


def _spread_out(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


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
