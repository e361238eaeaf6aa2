"""Compare how long models take for the same work: ratios to one of them, from one run.

In: models by name, and what each has to do. Out: for each name the ratio in every round. In a round all models work,
one after the other, so whatever else the machine does meets all of them; only times of one round are compared. What a
model leaves in the caches meets the next one, so the order changes from round to round until each has followed each.
Give one model under two names: the ratio of the second is the noise of this machine.

    latency_ratios({"base": model, "base again": model, "houlsby": adapted}, lambda model: model(input_ids))

Not here: operations, which are the same on every machine (memory/work.py).
"""

import time
from collections.abc import Callable, Iterable, Iterator

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
    for order in orders(names, rounds):
        seconds = {name: _seconds(models[name], call, clock) for name in order}
        # within the round: a pause of the machine meets one model, and must not meet its base of another round
        for name in names:
            ratios[name].append(seconds[name] / seconds[names[0]])
    return ratios


def orders(names: Iterable[str], rounds: int) -> Iterator[list[str]]:
    """Yield the names in an order for each round: a Williams design, without chance.

    In as many rounds as there are names, or twice as many if that is odd, each is first equally often, and each follows
    each other one in a round equally often.
    """
    names = list(names)
    n = len(names)
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(n)]  # 0, 1, -1, 2, -2: all differences occur once
    rows = [[names[(place + shift) % n] for place in zigzag] for shift in range(n)]
    if n % 2:  # then all differences occur with one sign in half of these
        rows += [row[::-1] for row in rows]
    for i in range(rounds):
        yield rows[i % len(rows)] if rows else []


def _seconds(model: nn.Module, call: Callable[[nn.Module], object], clock: Callable[[], float]) -> float:
    with measuring(model):
        start = clock()
        call(model)
        return clock() - start
