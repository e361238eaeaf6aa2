"""Experts: calibrated against autograd, counted against the router, planned for, and changed one by one."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from qlora_lab import cli
from qlora_lab.adapters.adapter import remove_adapter
from qlora_lab.adapters.lora import add_lora
from qlora_lab.measure.best_plan import best_plan
from qlora_lab.measure.expert_use import expert_use
from qlora_lab.measure.sensitivity import choices_of, sensitivity
from qlora_lab.model.experts import experts_of, stacks_of
from qlora_lab.model.layer_kinds import turned
from qlora_lab.model.load import load
from qlora_lab.quant.plan import Candidate, load_plan
from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.quant.stack import quantize_stack
from tests.model.families import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
CANDIDATES = [Candidate("nf4", 32, False), Candidate("nf3", 64, True)]
BATCHES = [{"input_ids": torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(i))} for i in range(12)]
UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture
def mixture():
    return tiny("Mixtral", initializer_range=0.2, hidden_size=32)


def test_moments_of_an_expert_are_those_of_its_tokens(mixture):
    found = sensitivity(mixture, None, BATCHES[:2], progress=False)
    assert set(stacks_of(mixture)) < set(found) and found[UP].shape == (4, 32)
    block, want = mixture.model.layers[1].mlp, torch.zeros(4, 32, dtype=torch.float64)

    def seen(module, inputs, output):
        for x, experts in zip(inputs[0].double(), output[2], strict=True):  # of each token: its two experts
            want[experts] += x**2

    block.gate.register_forward_hook(seen)
    for batch in BATCHES[:2]:
        mixture(**batch)
    torch.testing.assert_close(found[UP].double(), want / 80, rtol=1e-4, atol=1e-9)  # of 80 tokens, routed or not


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Llama4Text"])  # also turned, with biases, and sorted
def test_fisher_is_the_squared_gradient_of_each_experts_weights(family):
    model = tiny(family)
    ids = torch.arange(3, 13)[None]
    found = sensitivity(model, None, [{"input_ids": ids}], fisher=True, seed=1, progress=False)
    stacks = stacks_of(model)
    for stack in stacks.values():
        stack.requires_grad_()
    row = model(ids).logits[0, :-1]
    labels = torch.multinomial(row.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    grads = torch.autograd.grad(cross_entropy(row, labels, reduction="sum"), list(stacks.values()))
    for path, grad in zip(stacks, grads, strict=True):
        want = turned(model, path, grad).double().square().mean(1) / 2 / 9  # (experts, in_features), 9 predicted tokens
        torch.testing.assert_close(found[path].double(), want, rtol=1e-3, atol=1e-3 * want.max().item())


def test_an_expert_is_counted_where_the_router_sends_tokens(mixture):
    theirs, want, some = experts_of(mixture), mixture(**BATCHES[0]).logits, BATCHES[:3]
    rows = expert_use(mixture, None, some, CANDIDATES[0], progress=False)
    assert experts_of(mixture) == theirs and torch.equal(
        mixture(**BATCHES[0]).logits, want
    )  # the family's own are back
    assert [(row.layer, row.expert) for row in rows[3:5]] == [
        ("model.layers.0.mlp.experts", 3),
        ("model.layers.1.mlp.experts", 0),
    ]
    assert sum(row.share for row in rows) == pytest.approx(2 * 2)  # two experts of a token in each of two layers
    choices = choices_of(mixture, CANDIDATES, sensitivity(mixture, None, some, fisher=True), progress=False)
    errors = dict(zip(choices.layers, choices.error[:, 0], strict=True))
    assert sum(row.change for row in rows) == pytest.approx(sum(errors[path] for path in stacks_of(mixture)))
    chosen = []
    for layer in mixture.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, x, y: chosen.append(y[2].flatten()))
    for batch in some:
        mixture(**batch)
    for i, tokens in enumerate((torch.cat(chosen[::2]), torch.cat(chosen[1::2]))):  # layers in turn
        assert [row.tokens for row in rows[4 * i : 4 * i + 4]] == tokens.bincount(minlength=4).tolist()


@pytest.mark.long
def test_the_expected_change_is_the_measured_one(mixture):
    """In the last layer: before it, an error also sends tokens to other experts, which no gradient tells."""
    rows = [row for row in expert_use(mixture, None, BATCHES, CANDIDATES[0], progress=False) if "layers.1" in row.layer]
    logs = [mixture(**batch).logits.log_softmax(-1) for batch in BATCHES]
    for row in rows:
        kept = {name: p.clone() for name, p in mixture.named_parameters() if name.startswith(row.layer)}
        for name in kept:
            matrix = mixture.get_parameter(name).data[row.expert]
            matrix.copy_(dequantize(quantize(matrix.clone(), *CANDIDATES[0])))
        now = [mixture(**batch).logits.log_softmax(-1) for batch in BATCHES]
        # the loss under the model's own predictions grows by their KL divergence
        kl = sum((a.exp() * (a - b)).sum(-1)[:, :-1].mean() for a, b in zip(logs, now, strict=True)) / len(BATCHES)
        assert row.change == pytest.approx(kl.item(), rel=0.25)  # 160 to 550 tokens each: draws of labels decide
        for name, weight in kept.items():
            mixture.get_parameter(name).data.copy_(weight)


def test_an_expert_without_tokens_costs_nothing():
    rows = expert_use(tiny("Mixtral"), None, [{"input_ids": torch.tensor([[5, 9]])}], progress=False)
    idle = [row for row in rows if not row.tokens]
    assert idle and all(row.change == row.share == 0 for row in idle)
    assert all(row.change > 0 for row in rows if row.tokens == 2)


def test_what_has_no_experts_is_named(tiny_llama):
    with pytest.raises(
        ValueError, match="LlamaForCausalLM has no stacks of experts: give a mixture, loaded with codeb"
    ):
        expert_use(tiny_llama, None, BATCHES)
    with pytest.raises(ValueError, match="block_size=8 is not allowed"):
        expert_use(tiny_llama, None, BATCHES, Candidate("nf4", 8, False))


@pytest.mark.parametrize("targets", ["experts", "experts.down_proj"])
def test_experts_with_adapters_are_refused(mixture, targets):
    s = dict.fromkeys(stacks_of(mixture))
    add_lora(mixture, r=2, targets=targets)
    measures = (sensitivity, expert_use, lambda model, *rest, progress: choices_of(model, CANDIDATES, s))
    for measure in measures:
        with pytest.raises(ValueError, match="experts of this Mixtral.* have adapters: remove the adapters first"):
            measure(mixture, None, BATCHES[:1], progress=False)
    rows = expert_use(remove_adapter(mixture), None, BATCHES[:1], progress=False)
    assert len(rows) == 8


# ---------------------------------------------------------------------------------------------------- plans of mixtures


def test_bits_of_experts_are_those_of_a_stack(mixture):
    s = sensitivity(mixture, None, BATCHES[:1], progress=False)
    choices = choices_of(mixture, CANDIDATES, s, progress=False)
    row = choices.layers.index(UP)
    stack = mixture.get_parameter(UP).detach()
    assert choices.numel[row] == stack.numel() and choices.matrices[row] == 4 and choices.matrices[0] == 1
    assert choices.bits[row].tolist() == [8 * quantize_stack(stack, *candidate).nbytes for candidate in CANDIDATES]
    with pytest.raises(ValueError, match=f"the sensitivity of {UP} has shape .32,., but 32 inputs"):
        choices_of(mixture, CANDIDATES, s | {UP: torch.ones(32)}, progress=False)


@pytest.mark.long
def test_the_command_plans_experts_and_load_obeys(tmp_path, tokenizer, capsys):
    folder, out = tmp_path / "model", tmp_path / "plan.json"
    tiny("GptOss", vocab_size=280).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("the sum of two numbers is a number. " * 20)
    argv = [
        "block-size",
        folder,
        "--bits",
        "4.6",
        "--block-sizes",
        16,
        128,
        "--text",
        text,
        "--windows",
        2,
        "--length",
        16,
    ]
    assert cli.main([str(a) for a in (*argv, "--out", out, "--json")]) == 0
    capsys.readouterr()
    plan = load_plan(out)
    packed, _ = load(folder, plan=plan, dtype=torch.float32, device="cpu", progress=False)
    stacks = [path for path in plan.chosen if path.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(stacks) == 4 and len({plan.chosen[path] for path in plan.chosen}) == 2
    for path in plan.chosen:
        q = packed.get_submodule(path).weight
        assert Candidate(q.codebook, q.block_size, q.double_quant) == plan.chosen[path]
    cut = json.loads(out.read_text())
    del cut["layers"][stacks[0]]
    out.write_text(json.dumps(cut))
    with pytest.raises(ValueError, match=f"lacks {stacks[0]}, which the model has: make a plan for this model"):
        load(folder, plan=out, progress=False)


def test_a_plan_keeps_the_share_of_constants_of_each_expert(mixture):
    """With double quantization each has a scale and an offset of its own."""
    s = sensitivity(mixture, None, BATCHES[:1], progress=False)
    choices = choices_of(mixture, CANDIDATES[1:], s, progress=False)
    packed = [quantize_stack(stack.detach(), *CANDIDATES[1]) for stack in stacks_of(mixture).values()]
    linears = [
        quantize(layer.weight, *CANDIDATES[1]) for layer in mixture.modules() if isinstance(layer, torch.nn.Linear)
    ]
    weights = [*packed, *linears[:-1]]  # without the head
    share = sum(q.constants.nbytes for q in weights) / sum(q.packed.nbytes for q in weights)
    assert best_plan(choices, constants_share=share * 1.0001).bits_per_parameter > 0
    with pytest.raises(ValueError, match="constants_share=.* is too small"):
        best_plan(choices, constants_share=share * 0.9999)
