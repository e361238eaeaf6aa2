"""Ratios of one run, with a clock that the test holds: no second of this machine is in them."""

import itertools
from collections import Counter
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from qlora_lab.measure.latency import latency_ratios, orders


class Slow(torch.nn.Module):
    """Takes as many ticks of the clock as the next of `ticks` says."""

    def __init__(self, clock, *ticks):
        super().__init__()
        self.clock = clock
        self.ticks = list(ticks)

    def forward(self):
        assert not self.training and not torch.is_grad_enabled()
        self.clock.now += self.ticks.pop(0)


def run(model):
    model()


def test_each_round_is_compared_with_its_own_base():
    """The first call of each is not counted; the second round is slower for all."""
    clock = SimpleNamespace(now=0)
    models = {"base": Slow(clock, 99, 2, 10), "merged": Slow(clock, 99, 2, 10), "prompt": Slow(clock, 99, 3, 20)}
    found = latency_ratios(models, run, rounds=2, clock=lambda: clock.now)
    assert found == {"base": [1, 1], "merged": [1, 1], "prompt": [1.5, 2]}


class Warm(torch.nn.Module):
    """Takes 9 ticks if it ran last, and 10 if another one has filled the caches since."""

    last = None

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def forward(self):
        self.clock.now += 9 if Warm.last is self else 10
        Warm.last = self


def test_a_model_that_finds_its_own_weights_in_the_caches_is_no_faster():
    """The same model under two names was always called twice in a row, but for one round in seven."""
    clock = SimpleNamespace(now=0)
    models = {name: Warm(clock) for name in ("base", "lora", "houlsby", "prefix", "prompt", "merged")}
    found = latency_ratios({"base": models["base"], "base again": models["base"]} | models, run, 28, lambda: clock.now)
    assert median(found["base again"]) == 1 and median(found["merged"]) == 1


@pytest.mark.parametrize("names", ["ab", "abc", "abcd", "abcdefg"])
def test_each_model_follows_each_other_one_equally_often(names):
    rounds = len(names) * (1 + len(names) % 2)
    found = ["".join(order) for order in orders(names, 2 * rounds)]
    assert {"".join(sorted(order)) for order in found} == {names}
    assert set(Counter(order[0] for order in found).values()) == {2 * rounds // len(names)}
    pairs = Counter(pair for order in found for pair in itertools.pairwise(order))
    assert len(pairs) == len(names) * (len(names) - 1) and len(set(pairs.values())) == 1


def test_models_are_called_in_these_orders():
    asked = []
    models = {name: torch.nn.Identity() for name in "abc"}
    names = {model: name for name, model in models.items()}
    latency_ratios(models, lambda model: asked.append(names[model]), rounds=4)
    assert asked[3:] == [name for order in orders("abc", 4) for name in order]  # the first three are not counted


def test_models_are_left_in_their_mode(tiny_llama):
    tiny_llama.train()
    ids = torch.full((1, 3), 5)
    found = latency_ratios({"base": tiny_llama, "again": tiny_llama}, lambda model: model(ids), rounds=1)
    assert tiny_llama.training and found["base"] == [1.0] and found["again"][0] > 0


@pytest.mark.parametrize(("rounds", "count"), [(0, 2), (3, 1), (3, 0)])
def test_nothing_to_compare_is_refused(rounds, count):
    models = {str(i): torch.nn.Identity() for i in range(count)}
    with pytest.raises(ValueError, match=f"{rounds} rounds of {count} models give no ratio"):
        latency_ratios(models, run, rounds)
