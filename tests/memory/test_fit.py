"""A plan fits by its own ledger, its limits are limits, and it prefers what changes no bit."""

import json
import re
from dataclasses import replace

import pytest

from qlora_lab.memory.fit import EIGHT, GIB, ORDER, fit
from qlora_lab.memory.predict import ledger_of, predict_memory
from qlora_lab.memory.setup import Setup
from qlora_lab.memory.shape import shape_of
from qlora_lab.optim.paging import PAGE_SIZE
from qlora_lab.train.settings import Settings

WANTED = {"r": 64, "length": 512, "batch_size": 8}


def peak(**setup):
    return predict_memory("llama-7b", **WANTED | setup).peak


def test_what_fits_is_left_as_it_is():
    found = fit("llama-7b", 80, **WANTED)
    assert found.fits and found.switched == () and found.chosen == found.asked
    assert found.chosen.peak == peak() and found.free == 80 * GIB - peak()


@pytest.mark.long
def test_switches_come_in_the_order_of_their_price():
    switched = [fit("llama-7b", gb, **WANTED).switched for gb in (80, 12, 7.5, 6)]
    assert switched == [ORDER[:0], ORDER[:1], ORDER[:2], ORDER[:3]]


@pytest.mark.long
@pytest.mark.parametrize("gb", [80, 24, 12, 8, 6])
def test_the_ledger_of_the_advised_settings_says_the_same(gb):
    found = fit("llama-7b", gb, **WANTED)
    run = Settings(**found.settings)  # names and values that finetune takes
    setup = {"micro_batch_size": run.micro_batch_size, "gradient_checkpointing": run.gradient_checkpointing}
    setup |= {"optimizer_bits": run.optimizer_bits, "optimizer_budget": run.optimizer_budget}
    assert found.fits and peak(**setup) == found.chosen.peak <= gb * GIB


def test_limits_fit_and_one_more_does_not():
    found, card = fit("llama-7b", 8, **WANTED), 8 * GIB
    how = {"gradient_checkpointing": True}
    assert found.settings["gradient_checkpointing"]
    rows = {"batch_size": found.rows, **how}
    longest = {"batch_size": 1, "length": found.longest, **how}
    rank = {"r": found.rank, "micro_batch_size": found.settings["micro_batch_size"], **how}
    for limit, name in ((rows, "batch_size"), (longest, "length"), (rank, "r")):
        assert peak(**limit) <= card < peak(**limit | {name: limit[name] + 1}), name


def test_each_switch_alone_saves_what_it_says():
    found = fit("llama-7b", 24, **WANTED)
    alone = {one.name: one for one in found.switches}
    assert tuple(alone) == (*ORDER, EIGHT)
    assert all(one.saves == peak() - one.peak > 0 for one in found.switches)
    assert alone["micro-batches"].peak == peak(micro_batch_size=1)
    assert alone["gradient checkpointing"].peak == peak(gradient_checkpointing=True)
    assert alone[EIGHT].peak == peak(optimizer_bits=8)
    assert alone["paged optimizer"].peak == peak(optimizer_budget=PAGE_SIZE) < alone[EIGHT].peak
    assert alone["gradient checkpointing"].longest > alone["micro-batches"].longest


def test_packing_is_compared_where_the_data_are_known():
    """8 examples of 128 tokens fill 2 rows of 512."""
    found = fit("llama-7b", 24, **WANTED, mean_length=128)
    assert found.switches[-1].name == "packing" and found.switches[-1].peak == peak(batch_size=2, packing=True)


def test_pages_leave_only_as_far_as_they_must():
    found, how = fit("llama-7b", 6, **WANTED), {"micro_batch_size": 1, "gradient_checkpointing": True}
    budget = found.settings["optimizer_budget"]
    assert found.switched == ORDER and PAGE_SIZE < budget < predict_memory("llama-7b", r=64).row("moments").predicted
    assert peak(**how, optimizer_budget=budget) <= 6 * GIB < peak(**how, optimizer_budget=budget + PAGE_SIZE)


@pytest.mark.parametrize(
    ("name", "gb", "rows", "phase"),
    [("llama-7b", 24, 16, "loss"), ("llama-33b", 24, 16, "backward"), ("llama-7b", 8, 1, "update")],
)
def test_the_printed_groups_are_those_of_the_peak_and_add_up_to_it(name, gb, rows, phase):
    """Logits are gone before the update, so a group of another phase would be memory that is never needed at once."""
    found = fit(name, gb, r=64, length=512, batch_size=rows)
    assert f'at its peak, in the phase "{phase}":' in str(found)
    printed = [float(size) for size in re.findall(r"^ {11}[a-z]+ +([\d.]+) GiB$", str(found), re.M)]
    rounding = 0.005 * (len(printed) + 1)  # two decimals each
    assert len(printed) >= 5 and sum(printed) == pytest.approx(found.chosen.peak / GIB, abs=rounding)


def test_a_65b_model_fits_on_48_gb_as_the_paper_says():
    found = fit("llama-65b", 48, r=64, length=512, batch_size=1)
    assert found.fits and found.switched == ("gradient checkpointing",)
    assert not fit("llama-65b", 48, "lora", r=64, length=512, batch_size=1).fits


def test_what_never_fits_says_how_much_is_missing():
    found = fit("llama-2-70b", 24)
    assert not found.fits and found.free < 0 and (found.longest, found.rows, found.rank) == (0, 0, 0)
    assert "does not fit on a card of 24 GiB" in " ".join(str(found).split())  # a long line is wrapped


def test_the_largest_rank_is_that_of_the_widest_layer():
    """More than a layer's own rank expresses nothing more: SmolLM2's k_proj is 576 x 192, its q_proj 576 x 576."""
    assert fit(replace(shape_of("smollm2-135m"), layers=1), 1000).rank == 576


def test_micro_batches_that_cost_more_than_they_save_are_not_taken():
    """Gradients of bf16 weights are summed in float32, 4 bytes a weight; with all rows at once there is no sum."""
    shape = replace(shape_of("llama-7b"), layers=4)
    asked = ledger_of(shape, Setup(method="full"))
    summed = ledger_of(shape, Setup(method="full", micro_batch_size=1))
    assert summed.row("sums of gradients").predicted == 4 * shape.parameters and summed.peak > asked.peak
    found = fit(shape, (asked.peak - 1) / GIB, "full")
    assert "micro-batches" not in found.switched and found.chosen.peak < asked.peak


def test_a_switch_that_saves_nothing_is_not_listed():
    """LLaMA-7B's micro-batches of full fine-tuning need sums of gradients, larger than what they save."""
    found = fit("llama-7b", 24, "full")
    assert "micro-batches" not in {switch.name for switch in found.switches} and "saves -" not in str(found)
    assert found.switches and all(switch.saves > 0 for switch in found.switches)


def test_full_fine_tuning_has_no_rank():
    assert fit(replace(shape_of("llama-7b"), layers=1), 24, "full").rank == 0


def test_a_plan_is_plain_values():
    found = fit("llama-7b", 24, **WANTED)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["limits"]["rows"] == found.rows and data["chosen"]["peak"] == found.chosen.peak


@pytest.mark.parametrize("gb", [0, -1, float("nan"), float("inf"), "24", True])
def test_a_card_without_memory_is_refused(gb):
    with pytest.raises(ValueError, match="it is the memory of a card, above 0 GB"):
        fit("llama-7b", gb)


@pytest.mark.parametrize("method", ["houlsby", "prefix", "prompt", "zero_bias"])
def test_each_method_gets_advice_that_it_can_follow(method):
    shape = replace(shape_of("llama-7b"), layers=2)
    advice = fit(shape, 2, method, length=2048, batch_size=64, mean_length=500)
    names = {switch.name for switch in advice.switches}
    assert ("gradient checkpointing" in names) == (method != "prefix")
    assert ("packing" in names) == (method in ("houlsby", "zero_bias"))
    assert advice.rank == 0 and "rank" not in str(advice)


def test_a_ledger_refuses_what_a_method_cannot_do():
    with pytest.raises(ValueError, match="method='prefix' cannot checkpoint gradients"):
        Setup(method="prefix", gradient_checkpointing=True)
    with pytest.raises(ValueError, match="rows cannot be packed with method='prompt'"):
        Setup(method="prompt", packing=True)
    with pytest.raises(ValueError, match="choose method='lora'"):
        Setup(method="qlora", codebook="none")
    with pytest.raises(ValueError, match="has no biases to train: use zero_bias"):
        fit(replace(shape_of("llama-7b"), layers=1), 24, "bitfit")
