"""Ratios of one run, with a clock that the test holds: no second of this machine is in them."""

from types import SimpleNamespace

import pytest
import torch

from qlora_lab.measure.latency import latency_ratios


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


def test_each_round_starts_with_the_next_model():
    asked = []
    models = {name: torch.nn.Identity() for name in "abc"}
    names = {model: name for name, model in models.items()}
    latency_ratios(models, lambda model: asked.append(names[model]), rounds=4)
    assert "".join(asked[3:]) == "abc" + "bca" + "cab" + "abc"  # the first three are not counted


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
