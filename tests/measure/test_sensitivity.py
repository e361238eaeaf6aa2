"""Sensitivities against autograd on a model small enough to do without shortcuts, and the choices made of them."""

import copy
import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from qlora_lab import cli
from qlora_lab.measure.best_plan import best_plan, uniform
from qlora_lab.measure.sensitivity import choices_of, sensitivity
from qlora_lab.memory.measured import measure_memory
from qlora_lab.model.linear4bit import Linear4bit, quantize_linears
from qlora_lab.model.load import load
from qlora_lab.model.quantized_folder import quantize_folder
from qlora_lab.quant.plan import Candidate, load_plan
from qlora_lab.quant.quantize import dequantize, quantize

CANDIDATES = [Candidate("nf4", 32, False), Candidate("nf4", 128, False), Candidate("nf3", 64, True)]
BATCHES = [{"input_ids": torch.arange(start, start + 20).view(2, 10)} for start in (3, 101)]
IDS = torch.arange(3, 40)[None]
pytestmark = pytest.mark.usefixtures("one_thread")
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def choices(tiny_llama):
    return choices_of(tiny_llama, CANDIDATES, sensitivity(tiny_llama, None, BATCHES, fisher=True), progress=False)


def test_moments_are_those_of_the_inputs(tiny_llama):
    found = sensitivity(tiny_llama, None, BATCHES)
    seen = []
    tiny_llama.get_submodule(UP).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for batch in BATCHES:
        tiny_llama(**batch)
    x = torch.cat(seen).flatten(0, 1).double()  # (tokens, in_features)
    assert len(found) == 14 and found[UP].dtype == torch.float32
    assert torch.allclose(found[UP].double(), (x**2).mean(0), rtol=1e-6)


def test_fisher_is_the_squared_gradient_of_each_window(tiny_llama):
    """Without shortcuts: each row's loss by the same draws, its gradient by autograd, squared."""
    rows = torch.arange(3, 27).view(4, 6)
    found = sensitivity(tiny_llama, None, [{"input_ids": rows[:2]}, {"input_ids": rows[2:]}], fisher=True, seed=1)
    logits = tiny_llama(rows).logits[:, :-1]  # (4, 5, vocabulary)
    for name in (UP, "model.layers.0.self_attn.v_proj"):
        total, draws = 0, torch.Generator().manual_seed(1)
        for row in logits:
            labels = torch.multinomial(row.detach().softmax(-1), 1, generator=draws)[:, 0]
            loss = cross_entropy(row, labels, reduction="sum")
            (grad,) = torch.autograd.grad(loss, tiny_llama.get_submodule(name).weight, retain_graph=True)
            total = total + grad.double() ** 2
        assert torch.allclose(found[name].double(), total.mean(0) / 2 / 20, rtol=1e-4)  # 4 x 5 predicted tokens


@pytest.mark.long
def test_fisher_is_the_expectation_over_all_labels(tiny_llama):
    """Its definition: sum over tokens and labels of p (d log p / dW)^2, without draws. 400 draws of a window are near;
    squares summed token by token would be 16 times as much for this k_proj.
    """
    ids, name = torch.tensor([[200, 100, 50, 20]]), "model.layers.1.self_attn.k_proj"
    drawn = sensitivity(tiny_llama, None, [{"input_ids": ids.expand(400, -1)}], fisher=True)[name].double()
    logs = tiny_llama(ids).logits[0, :-1].log_softmax(-1)  # (3, vocabulary)
    want = 0
    for row in logs:
        each = torch.eye(len(row))
        weight = tiny_llama.get_submodule(name).weight
        (grads,) = torch.autograd.grad(row, weight, each, retain_graph=True, is_grads_batched=True)
        want = want + torch.einsum("v,vij->j", row.detach().exp(), grads**2) / 2 / len(weight) / len(logs)
    assert drawn.sum().item() == pytest.approx(want.sum().item(), rel=0.2)  # a few labels make most of it


def test_measuring_changes_nothing(tiny_llama):
    tiny_llama.train()
    before, state = copy.deepcopy(tiny_llama.state_dict()), torch.get_rng_state()
    first = sensitivity(tiny_llama, None, BATCHES, fisher=True)
    assert all(torch.equal(before[key], value) for key, value in tiny_llama.state_dict().items())
    assert tiny_llama.training and all(p.requires_grad and p.grad is None for p in tiny_llama.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in tiny_llama.modules())
    again = sensitivity(tiny_llama, None, BATCHES, fisher=True)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(tiny_llama, fisher, side):
    rows = [torch.arange(3, 10), torch.arange(40, 44), torch.tensor([77])]
    ids, mask = torch.full((3, 7), 2), torch.zeros(3, 7, dtype=torch.int64)
    for i, row in enumerate(rows):
        real = slice(7 - len(row), 7) if side == "left" else slice(len(row))
        ids[i, real], mask[i, real] = row, 1
    found = sensitivity(tiny_llama, None, [{"input_ids": ids, "attention_mask": mask, "labels": ids}], fisher=fisher)
    want = sensitivity(tiny_llama, None, [{"input_ids": row[None]} for row in rows], fisher=fisher)
    assert all(torch.allclose(found[name], want[name], rtol=1e-5) for name in want)


def test_how_a_model_trains_changes_nothing(tiny_llama):
    """Dropout, frozen weights, checkpointing, and a tied head, the embedding's second use."""
    want = sensitivity(tiny_llama, None, BATCHES, fisher=True)
    tiny_llama.train().requires_grad_(False)
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.5
    tiny_llama.activation_checkpointing_enable()
    found = sensitivity(tiny_llama, None, BATCHES, fisher=True)
    assert all(torch.equal(found[name], want[name]) for name in want)
    tiny_llama.lm_head.weight.data.copy_(tiny_llama.get_input_embeddings().weight)
    want = sensitivity(tiny_llama, None, BATCHES, fisher=True)
    tiny_llama.config.tie_word_embeddings = True
    tiny_llama.lm_head.weight = tiny_llama.get_input_embeddings().weight
    found = sensitivity(tiny_llama, None, BATCHES, fisher=True)
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("fisher", [False, True])
def test_in_another_precision(tiny_llama, fisher):
    """float64 inputs are what is squared, and must not be squared in place; bf16 has 8 bits, in every layer."""
    want = sensitivity(tiny_llama, None, BATCHES, fisher=fisher)
    wide = sensitivity(copy.deepcopy(tiny_llama).double(), None, BATCHES, fisher=fisher)
    assert all(torch.allclose(wide[name], want[name], rtol=1e-3) for name in want)
    narrow = sensitivity(tiny_llama.bfloat16(), None, BATCHES, fisher=fisher)
    assert narrow[UP].dtype == torch.float32
    assert narrow[UP].sum().item() == pytest.approx(want[UP].sum().item(), rel=0.1)


def test_no_bar_unless_asked_for(tiny_llama, capsys):
    sensitivity(tiny_llama, None, BATCHES, progress=False)
    assert capsys.readouterr() == ("", "")
    sensitivity(tiny_llama, None, BATCHES)
    assert "sensitivity" in capsys.readouterr().err


def test_a_model_that_predicts_nan_is_named(tiny_llama):
    tiny_llama.get_submodule(UP).weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="the model predicts NaN or infinity: look for them in its weights"):
        sensitivity(tiny_llama, None, BATCHES, fisher=True)


def test_a_text_is_cut_into_windows(tiny_llama, tokenizer):
    text = "the sum of the two numbers, " * 40
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = sensitivity(tiny_llama, tokenizer, text, windows=3, length=16)
    want = sensitivity(tiny_llama, None, [{"input_ids": torch.tensor(ids[:48]).view(3, 16)}])
    assert all(torch.allclose(found[name], want[name], rtol=1e-5) for name in want)
    with pytest.raises(ValueError, match=f"has {len(ids)} tokens, fewer than 900 windows of 16"):
        sensitivity(tiny_llama, tokenizer, text, windows=900, length=16)
    with pytest.raises(ValueError, match="length=1 is not allowed: it is a whole number of at least 2"):
        sensitivity(tiny_llama, tokenizer, text, windows=1, length=1)
    for batches in ([], [{"input_ids": torch.tensor([[5]])}]):
        with pytest.raises(ValueError, match="no batches with a token to predict"):
            sensitivity(tiny_llama, None, batches, fisher=True)


def test_errors_are_those_of_the_library(tiny_llama, choices):
    row, weight = choices.layers.index(UP), tiny_llama.get_submodule(UP).weight.detach()
    s = sensitivity(tiny_llama, None, BATCHES, fisher=True)[UP]
    for column, one in enumerate(CANDIDATES):
        q = quantize(weight, *one)
        want = ((dequantize(q, torch.float32) - weight).double() ** 2 * s.double()).sum()
        assert choices.error[row, column] == pytest.approx(want.item(), rel=1e-5)
        assert choices.bits[row, column] == 8 * q.nbytes


def test_a_folder_gives_the_choices_of_its_model(folder, tiny_llama, choices):
    s = sensitivity(tiny_llama, None, BATCHES, fisher=True)
    found = choices_of(folder, CANDIDATES, s, progress=False)
    assert found.layers == choices.layers and found.numel == choices.numel
    assert (found.error == choices.error).all() and (found.bits == choices.bits).all()


def test_what_does_not_belong_together_is_named(folder, tiny_llama):
    s = sensitivity(tiny_llama, None, BATCHES)
    with pytest.raises(ValueError, match="no candidates"):
        choices_of(tiny_llama, [], s)
    with pytest.raises(ValueError, match="block_size=8 is not allowed"):
        choices_of(tiny_llama, [Candidate("nf4", 8, False)], s)
    with pytest.raises(ValueError, match=f"sensitivity of {UP} has shape .3,., but 16 inputs"):
        choices_of(tiny_llama, CANDIDATES, s | {UP: torch.ones(3)}, progress=False)
    del s[UP]
    with pytest.raises(ValueError, match=f"sensitivity of {UP} is missing"):
        choices_of(tiny_llama, CANDIDATES, s, progress=False)
    with pytest.raises(ValueError, match="has no linear layer to quantise besides lm_head: load it with codebook=None"):
        sensitivity(quantize_linears(tiny_llama), None, BATCHES)


# ----------------------------------------------------------------------------------------------------- a plan, in use


def options_of(model):
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    return {name: Candidate(q.codebook, q.block_size, q.double_quant) for name, q in weights.items()}


@pytest.fixture
def plan(choices):
    """One that mixes candidates."""
    found = best_plan(choices, 4.7)  # nf4 takes 5.0 in blocks of 32, 4.25 in blocks of 128
    assert len(set(found.chosen.values())) > 1
    return found


@pytest.mark.long
def test_every_way_to_a_quantised_model_takes_a_plan(folder, tmp_path, tiny_llama, plan):
    path = plan.save(tmp_path / "plan.json")
    small = quantize_folder(folder, tmp_path / "small", plan=path, progress=False)
    assert load_plan(small / "plan.json") == plan
    described = json.loads((small / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "qlora_lab"  # bitsandbytes would read one block size for all
    assert described["not_for_bitsandbytes"].startswith("layers differ in data type or block size")
    mapped, _ = load(small, dtype=torch.float32, progress=False)
    arrived, _ = load(folder, plan=plan, dtype=torch.float32, progress=False)
    after = quantize_linears(tiny_llama, plan=str(path)).eval()
    assert options_of(mapped) == options_of(arrived) == options_of(after) == plan.chosen
    want = after(IDS).logits
    assert torch.equal(mapped(IDS).logits, want) and torch.equal(arrived(IDS).logits, want)
    with pytest.raises(ValueError, match="quantised as mixed by its plan.json, not by a plan: leave the options out"):
        load(small, plan=plan, progress=False)
    with pytest.raises(ValueError, match="in 4 bits already, as mixed by its plan.json"):
        choices_of(small, CANDIDATES, {})


def test_a_plan_that_does_not_fit_is_refused_before_any_work(folder, tmp_path, tiny_llama, plan):
    less = copy.deepcopy(plan)
    del less.chosen[UP]
    for use in (
        lambda **options: load(folder, progress=False, **options),
        lambda **options: quantize_folder(folder, tmp_path / "small", progress=False, **options),
        lambda **options: quantize_linears(tiny_llama, **options),
    ):
        with pytest.raises(ValueError, match=f"lacks {UP}, which the model has"):
            use(plan=less)
        with pytest.raises(ValueError, match=r"a plan decides .*: leave out \('nf4', 128, True\)"):
            use(plan=plan, block_size=128)
    assert not (tmp_path / "small").exists() and not options_of(tiny_llama)


def test_a_plan_is_read_before_a_model_is_fetched(tmp_path):
    for use in (load, lambda model, **options: quantize_folder(model, tmp_path / "small", **options)):
        with pytest.raises(FileNotFoundError, match=r"plan\.json"):
            use("org/nowhere", plan=tmp_path / "plan.json")


@pytest.mark.long
def test_a_folder_begun_by_another_plan_is_refused(folder, tmp_path, choices, plan, monkeypatch):
    from qlora_lab.model import quantized_folder

    monkeypatch.setattr(quantized_folder, "_finish", lambda *_: None)  # as if interrupted just before
    quantize_folder(folder, tmp_path / "small", plan=plan, progress=False)
    for other in (None, uniform(choices, CANDIDATES[0])):
        with pytest.raises(ValueError, match="begun with another plan"):
            quantize_folder(folder, tmp_path / "small", plan=other, progress=False)
    monkeypatch.undo()
    quantize_folder(folder, tmp_path / "small", plan=plan, progress=False)
    assert options_of(load(tmp_path / "small", progress=False)[0]) == plan.chosen


def test_the_ledger_refuses_a_mix(tiny_llama, plan):
    with pytest.raises(ValueError, match="layers are quantised in . ways, such as"):
        measure_memory(quantize_linears(tiny_llama, plan=plan))


@pytest.mark.long
def test_the_command_line_makes_a_plan_and_uses_it(folder, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("the sum of the two numbers, " * 40)
    out = tmp_path / "plan.json"
    command = ["block-size", str(folder), "--out", str(out), "--text", str(text), "--windows", "2", "--length", "16"]
    assert cli.main([*command, "--bits", "4.7", "--json"]) == 0
    figures, plan = json.loads(capsys.readouterr().out), load_plan(out)
    assert figures["bits_per_parameter"] == plan.bits_per_parameter <= 4.7
    assert sum(count for name, count in figures.items() if name.startswith("layers_")) == len(plan.chosen) == 14
    small = tmp_path / "small"
    assert cli.main(["quantize", str(folder), "--out", str(small), "--plan", str(out)]) == 0
    assert load_plan(small / "plan.json") == plan
    capsys.readouterr()
    monkeypatch.delattr("qlora_lab.measure.sensitivity._watched")  # minutes of calibration come after all checks
    assert cli.main([*command, "--bits", "4.0"]) == 2
    assert "budget of 4 bits per parameter is too small: the smallest plan takes 4." in capsys.readouterr().err
