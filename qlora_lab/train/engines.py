"""Choose the engine of a run: one process, or how several divide the base (distributed.py says what each does)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qlora_lab.train.distributed import DataParallel, OneProcess, joined
from qlora_lab.train.expert_parallel import ExpertParallel
from qlora_lab.train.sharded import Sharded

OPTIONS = {"shard": "the weights", "expert_parallel": "the experts"}  # setting -> what it spreads


@contextmanager
def engine_for(model: nn.Module, shard: bool = False, expert_parallel: bool = False) -> Iterator[OneProcess]:
    """The engine for all processes of torch's process group; OneProcess where there is none or only one.

    shard: spread the frozen weights over the processes. expert_parallel: spread the experts of each layer.
    Afterwards, even after an error, the model is as it was.
    Raises ValueError for either with one process, and for experts that cannot be spread.
    """
    check_several(shard, expert_parallel)
    kind = Sharded if shard else ExpertParallel if expert_parallel else DataParallel
    engine = kind(model) if joined() else OneProcess(model)
    try:
        yield engine
    except BaseException as error:
        try:
            engine.close()
        except RuntimeError as left:
            error.add_note(str(left))
        raise
    engine.close()


def check_several(shard: bool, expert_parallel: bool) -> None:
    """Raise ValueError for a setting that spreads something, in a single process."""
    for (name, what), asked in zip(OPTIONS.items(), (shard, expert_parallel), strict=True):
        if asked and not joined():
            flag = name.replace("_", "-")
            raise ValueError(
                f"{name} spreads {what} over processes, but this is the only one: start several with "
                f"`torchrun --nproc-per-node N -m -- qlora_lab.cli finetune ... --{flag}`, or leave it out"
            )
