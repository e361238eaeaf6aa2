"""Divide the work of a run: one process, or several that share the rows of each step.

In: a model with adapters. Out: an engine, whose `model` the loop calls for a loss. Each process has:
    OneProcess      all rows, all weights
    DataParallel    its share of the rows, all weights; torch's DDP adds up the adapters' gradients, once per step
    Sharded         its share of the rows, and of the bytes of each frozen weight (sharded.py)
    ExpertParallel  its share of the rows, and of the experts of each layer (expert_parallel.py)
Each process has whole adapters, gradients and optimizer state: so clipping, paging and checkpoints need no second form.
The loss is a sum over all rows of a step, so gradients are summed and never averaged.

`torchrun` starts the processes and numbers them (torchrun.py).
Not here: choosing an engine (engines.py). Not covered: tensor and pipeline parallelism, adapters or optimizer state in
shards.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from qlora_lab.adapters.adapter import Adapter
from qlora_lab.train import torchrun

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
    """What all kinds of run with several processes share. The adapters of process 0 become those of all."""

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


class Spread(_Several):
    """A run whose base lies in pieces, one in each process, until it is closed."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        # Connections of its own, so that the end of a run never meets messages that an error left under way.
        self._apart = dist.new_group(backend="gloo", timeout=WAIT)
        self._closed = False

    def finish(self, parameters: list[nn.Parameter]) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients])  # one message instead of hundreds
        dist.all_reduce(flat)
        _spread_out(flat, gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    @torch.no_grad()
    def close(self) -> None:
        if self._closed:  # after an error a run closes it, and then engine_for does
            return
        try:
            dist.monitored_barrier(self._apart, timeout=LATE)
            self._put_together()
        except RuntimeError as error:
            raise RuntimeError(
                "not all processes reached the end, so the base is still spread over them: load the model again"
            ) from error
        finally:
            self._closed = True
            self._let_go()
            dist.destroy_process_group(self._apart)

    def _put_together(self) -> None:
        """Give the model its whole weights back."""
        raise NotImplementedError

    def _let_go(self) -> None:
        """Forget the pieces; after an error there is nothing else to do."""

    def _gather(self, part: torch.Tensor) -> torch.Tensor:
        """Return the parts of all processes, of one shape and on the CPU, one after another."""
        whole = torch.empty(len(part) * self.size, *part.shape[1:], dtype=part.dtype)
        part = part.contiguous()
        dist.all_gather(list(_bytes(whole).split(part.nbytes)), _bytes(part), group=self._apart)
        return whole


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


@contextmanager
def processes() -> Iterator[int]:
    """Join the processes that torchrun started while the `with` block lasts; yields the rank of this one.

    NCCL where there is a GPU for each process of the node, else gloo. Without torchrun nothing is joined.
    Raises ValueError for more processes on a node than it has GPUs, if it has any, and for variables that torchrun
    would not set so.
    """
    if torchrun.world_size() <= 1:
        yield 0
        return
    torchrun.rank()  # raises for one that cannot be: torch would wait for it
    local = torchrun.local_rank()
    torchrun.check_meeting_point()
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
    if not joined():
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
    return not joined() or dist.get_rank() == 0


def is_first_on_node() -> bool:
    # Only torchrun's processes have a rank: without them, a LOCAL_RANK is a leftover of somebody's shell.
    return not joined() or torchrun.local_rank() == 0


def on_process_0(work: Callable[[], object]) -> None:
    """work() on process 0, which writes files, while the others wait; its error is an error on all."""
    with failing_together():
        if is_process_0():
            work()


def first_on_node(work: Callable[[], T]) -> T:
    """work() on the first process of each node, and then on the others, which find what it fetched."""
    is_first = is_first_on_node()
    with failing_together():
        result = work() if is_first else None
    return result if is_first else work()


def from_process_0(value: T) -> T:
    """The value that process 0 has, on all processes."""
    if not joined():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def joined() -> bool:
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
