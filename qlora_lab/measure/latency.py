"""Compare how long models take for the same work: ratios to one of them, from one run.

In: models by name, and what each has to do. Out: for each name the ratio in every round. In a round all models work,
one after the other, so whatever else the machine does meets all of them; only times of one round are compared. Each
round starts with the next model, so none is always the first. Give one model under two names: the ratio of the second
is the noise of this machine.

    latency_ratios({"base": model, "base again": model, "houlsby": adapted}, lambda model: model(input_ids))

Not here: operations, which are the same on every machine (memory/work.py).
"""

import time
from collections.abc import Callable

from torch import nn

from qlora_lab.model.modes import measuring


def latency_ratios(
    models: dict[str, nn.Module],
    call: Callable[[nn.Module], object],
    rounds: int = 15,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return name -> seconds of `call` divided by those of the first model, for each round.

    call: is given a model in evaluation mode, without gradients; on a GPU it has to wait for the result. clock: returns
    seconds. Raises ValueError for fewer than one round or two models.
    """
    if rounds < 1 or len(models) < 2:
        raise ValueError(f"{rounds} rounds of {len(models)} models give no ratio: take a round and two models at least")
    for model in models.values():
        _seconds(model, call, clock)  # what only a first call does
    names = list(models)  # a dict keeps its order
    ratios = {name: [] for name in models}
    for i in range(rounds):
        first = i % len(names)
        # what a model leaves in the caches meets the next one, so no place in the order may belong to one model
        seconds = {name: _seconds(models[name], call, clock) for name in names[first:] + names[:first]}
        # within the round: a pause of the machine meets one model, and must not meet its base of another round
        for name, taken in seconds.items():
            ratios[name].append(taken / seconds[names[0]])
    return ratios


def _seconds(model: nn.Module, call: Callable[[nn.Module], object], clock: Callable[[], float]) -> float:
    with measuring(model):
        start = clock()
        call(model)
        return clock() - start
