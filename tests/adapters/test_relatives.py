"""LoRA's relatives: equal to PEFT or to the papers' equations, trained, saved, resumed, merged, refused by name."""

import json
import warnings
from copy import deepcopy

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import qlora_lab as ql
from qlora_lab.adapters.adapter import learned
from qlora_lab.adapters.add_adapter import add_adapter
from qlora_lab.adapters.dora import DoRALinear
from qlora_lab.adapters.lora import LoRALinear, add_lora, lora_layers
from qlora_lab.adapters.peft_format import load_adapter, save_adapter
from qlora_lab.export.merge import TARGETS, merge
from qlora_lab.memory.measured import measure_memory
from qlora_lab.model.linear4bit import Linear4bit, decoded, quantize_linears
from qlora_lab.model.load import load
from qlora_lab.quant.quantize import quantize
from qlora_lab.train.lora_plus import rate_groups
from qlora_lab.train.run_record import check_same_run
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training
from tests.adapters.test_methods import EXAMPLES, IDS, disturbed, logits, train, with_peft

pytestmark = pytest.mark.usefixtures("one_thread")

RELATIVES = ["rslora", "dora", "pissa"]  # each a class of its own; LoftQ makes plain LoRA
WEIGHTS = "adapter_model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def in_4_bits_and_decoded(model):
    """The model in 4 bits, and one of nn.Linear with the same weights."""
    plain = deepcopy(model)
    packed = quantize_linears(model)
    for path, layer in packed.named_modules():
        if isinstance(layer, Linear4bit):
            plain.get_submodule(path).weight.data = decoded(layer)
    return packed.eval(), plain.eval()


def of_peft(base, **settings):
    wanted = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, peft.LoraConfig(**wanted | settings))


def moved(theirs):
    draws = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draws)
    return theirs


# ----------------------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("bits", [16, 4])
def test_dora_is_the_papers_equation(bits, with_bias):
    """Equation 5 in float64, from the whole weight."""
    torch.manual_seed(0)
    base = nn.Linear(64, 48, bias=with_bias)
    if bits == 4:
        base = Linear4bit(quantize(base.weight), base.bias)
    layer = DoRALinear(base, 4, 6, 0.0, torch.Generator().manual_seed(1))
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), base(x))  # at first
    layer.lora_B.data.normal_()
    layer.lora_magnitude_vector.data *= torch.linspace(0.5, 2, 48)
    changed = (decoded(base) + layer.scaling * layer.lora_B @ layer.lora_A).double()
    weight = layer.lora_magnitude_vector.double()[:, None] * changed / changed.norm(dim=1, keepdim=True)
    want = x.double() @ weight.t() + (base.bias.double() if with_bias else 0)
    torch.testing.assert_close(layer(x), want.float())
    torch.testing.assert_close(layer.change(decoded(base)), weight.float() - decoded(base))


@pytest.mark.parametrize("size", [0, 1e-3, 1, 1e3])
def test_lengths_need_no_decoded_weight(size):
    """Three sums in place of the norm of a matrix: float32 products, so 1e-6 of the longest of them."""
    torch.manual_seed(0)
    layer = DoRALinear(Linear4bit(quantize(torch.randn(48, 64))), 4, 4, 0.0, torch.Generator().manual_seed(1))
    layer.lora_B.data.normal_(std=size)
    direct = (decoded(layer.base).double() + layer.lora_B.double() @ layer.lora_A.double()).norm(dim=1)
    torch.testing.assert_close(layer.adapted_lengths().double(), direct, rtol=1e-6, atol=0)


def test_a_row_that_is_erased_stays_finite():
    layer = DoRALinear(nn.Linear(8, 8, bias=False), 8, 8, 0.0, torch.Generator().manual_seed(1))
    layer.lora_A.data = torch.eye(8)
    layer.lora_B.data = -layer.base.weight.data.clone()
    assert layer(torch.ones(1, 8)).isfinite().all()


def test_lengths_that_are_kept_follow_the_weights(tiny_llama):
    """Whatever changed them: a step, an assignment, another strength, a cast and its way back."""
    layer = lora_layers(add_adapter(tiny_llama.eval(), "dora", r=2))[Q_PROJ]
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))

    def changes():
        layer.lora_B.data = torch.ones(16, 2)
        yield
        layer.lora_A.data.mul_(2)
        yield
        layer.set_strength(5, 0.0)
        yield
        layer.bfloat16().float()
        yield

    for _ in changes():
        torch.testing.assert_close(layer(x), x @ (layer.base.weight + layer.change(layer.base.weight)).t())
        assert torch.equal(layer(x), layer.train()(x)) and layer.eval()


def test_rslora_divides_by_the_root(tiny_llama):
    layer = lora_layers(add_adapter(tiny_llama, "rslora", r=9, alpha=6))[Q_PROJ]
    assert layer.scaling == 6 / 3


def test_pissa_starts_as_the_largest_part_of_the_weight(tiny_llama):
    packed, plain = in_4_bits_and_decoded(tiny_llama)
    before = logits(packed)
    model = add_adapter(packed, "pissa", r=3, alpha=7)
    assert torch.equal(logits(model), before)
    for path, layer in lora_layers(model).items():
        U, S, Vh = torch.linalg.svd(plain.get_submodule(path).weight)
        part = layer.scaling * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(part, U[:, :3] * S[:3] @ Vh[:3], rtol=1e-4, atol=1e-4)  # two ways to it in float32


def test_a_rank_above_the_layers_own_starts_as_lora_does(tiny_llama):
    layer = lora_layers(add_adapter(tiny_llama, "pissa", r=20, targets="q_proj"))[Q_PROJ]  # 16 x 16
    assert layer.lora_A[16:].count_nonzero() and not layer.lora_B[:, 16:].count_nonzero()
    torch.testing.assert_close(layer.scaling * layer.lora_B @ layer.lora_A, layer.base.weight, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("method", RELATIVES)
def test_peft_reads_it_with_the_same_logits(tmp_path, tiny_llama, method):
    """Over a 4-bit base; PEFT has the decoded weights."""
    packed, plain = in_4_bits_and_decoded(tiny_llama)
    before = logits(packed)
    ours = disturbed(add_adapter(packed, method, r=4, alpha=6))
    theirs = with_peft(plain, save_adapter(ours, tmp_path / "adapter"))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)  # float32, sums in another order
    assert (logits(ours) - before).abs().max() > 0.1  # it is at work


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}])
def test_gradients_and_logits_are_those_of_peft(tmp_path, tiny_llama, settings):
    packed, plain = in_4_bits_and_decoded(tiny_llama)
    theirs = moved(of_peft(plain, **settings))
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(packed, tmp_path)
    for model in (ours, theirs):
        model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    names = {name.replace("base_model.model.", "").replace(".default", ""): p for name, p in theirs.named_parameters()}
    for name, parameter in learned(ours).items():
        torch.testing.assert_close(parameter.grad, names[f"{name}.weight"].grad, rtol=1e-3, atol=1e-4, msg=name)


def test_dropout_acts_as_in_peft():
    """One layer, so that both draw the same mask."""
    torch.manual_seed(0)
    base = nn.Linear(16, 16).requires_grad_(False)
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.5, use_dora=True)
    theirs = peft.tuners.lora.Linear(deepcopy(base), "default", config, r=4, lora_alpha=6)
    moved(theirs)
    ours = DoRALinear(base, 4, 6, 0.5, torch.Generator())
    for name, parameter in ours.learned().items():
        parameter.data = getattr(theirs, name)["default"].weight.data.clone()
    x = torch.randn(5, 16)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        results.append(layer.train()(x))
    torch.testing.assert_close(*results)
    assert not torch.allclose(results[0], ours.eval()(x))


def test_pissa_learns_what_pefts_learns(tiny_llama):
    """PEFT cuts the base, we do not: the same steps give the same model. Sums differ, so float32 rounding."""
    theirs = of_peft(deepcopy(tiny_llama), init_lora_weights="pissa")
    ours = add_adapter(tiny_llama, "pissa", r=4, alpha=6, targets=["q_proj", "down_proj"])
    for path, layer in lora_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(path)
        for own in ((layer.lora_A, layer.first_A), (layer.lora_B, layer.first_B)):
            name = "lora_A" if own[0] is layer.lora_A else "lora_B"
            for tensor in own:  # a singular vector has two signs
                tensor.data = getattr(twin, name)["default"].weight.data.clone()
    first = logits(ours)
    torch.testing.assert_close(first, logits(theirs), rtol=1e-3, atol=1e-3)
    for model in (ours, theirs):
        rule = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            model(IDS, labels=IDS).loss.backward()
            rule.step()
            rule.zero_grad()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=2e-3, atol=2e-3)
    assert (logits(ours) - first).abs().max() > 0.05


def test_a_dora_of_early_peft_is_read(tmp_path, tiny_llama):
    """Its magnitudes were parameters, not modules."""
    from safetensors.torch import load_file, save_file

    model = disturbed(add_adapter(deepcopy(tiny_llama), "dora", r=2))
    save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    early = {key.replace("vector.weight", "vector"): tensor for key, tensor in stored.items()}
    save_file(early, tmp_path / "adapter" / WEIGHTS)
    assert torch.equal(logits(load_adapter(tiny_llama, tmp_path / "adapter")), logits(model))


# ----------------------------------------------------------------------------------------------- training and files


@pytest.mark.slow
@pytest.mark.parametrize("method", RELATIVES)
def test_it_learns_and_a_resumed_run_gives_the_same_bytes(tmp_path, tiny_llama, tokenizer, method):
    base = quantize_linears(tiny_llama)
    frozen = {name: p.clone() for name, p in base.named_parameters()}

    def model():
        return add_adapter(deepcopy(base), method, r=2)

    first = model()
    whole = train(first, tokenizer, tmp_path / "whole", save_every=3)
    assert sum(whole.losses[-2:]) < 0.99 * sum(whole.losses[:2])
    assert all(torch.equal(p, frozen[name]) for name, p in first.named_parameters() if name in frozen)
    stopped = Training(model(), tokenizer, EXAMPLES, tmp_path / "cut", whole.settings, progress=False)
    for line in stopped:
        if line["step"] == 3:
            stopped.stop()
    resumed = train(model(), tokenizer, tmp_path / "cut", save_every=3, resume=True)
    assert resumed.losses == whole.losses
    assert (whole.adapter / WEIGHTS).read_bytes() == (resumed.adapter / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_resumed_pissa_keeps_its_start(tmp_path, tiny_llama, tokenizer, monkeypatch):
    """Another processor gives singular vectors other signs: A0 and B0 belong to the A and B of the checkpoint."""
    whole = train(add_adapter(deepcopy(tiny_llama), "pissa", r=2), tokenizer, tmp_path / "whole")
    first = add_adapter(deepcopy(tiny_llama), "pissa", r=2)
    for line in (run := Training(first, tokenizer, EXAMPLES, tmp_path / "cut", whole.settings, progress=False)):
        if line["step"] == 3:
            run.stop()
    svd = torch.linalg.svd

    def other_signs(*args, **kwargs):
        U, S, Vh = svd(*args, **kwargs)
        return -U, S, -Vh

    monkeypatch.setattr(torch.linalg, "svd", other_signs)
    second = add_adapter(tiny_llama, "pissa", r=2)
    assert torch.equal(lora_layers(second)[Q_PROJ].first_A, -lora_layers(first)[Q_PROJ].first_A)
    resumed = train(second, tokenizer, tmp_path / "cut", resume=True)
    assert (whole.adapter / WEIGHTS).read_bytes() == (resumed.adapter / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_the_record_says_which_relative_it_was(tmp_path, tiny_llama, tokenizer):
    first = add_adapter(deepcopy(tiny_llama), "rslora", r=2)
    run = Training(first, tokenizer, EXAMPLES, tmp_path / "run", Settings(steps=2, batch_size=4), progress=False)
    for _ in run:
        run.stop()
    with pytest.raises(ValueError, match=r"adapter.method: rslora in the checkpoint, dora now"):
        train(add_adapter(tiny_llama, "dora", r=2), tokenizer, tmp_path / "run", steps=2, resume=True)


@pytest.mark.parametrize("method", ["rslora", "dora"])
def test_it_goes_through_its_folder(tmp_path, tiny_llama, method):
    fresh, own = deepcopy(tiny_llama), add_adapter(deepcopy(tiny_llama), method, r=2, seed=5)
    model = disturbed(add_adapter(tiny_llama, method, r=2, alpha=3))
    folder = save_adapter(model, tmp_path / "adapter")
    for loaded in (load_adapter(fresh, folder), load_adapter(own, folder)):
        assert torch.equal(logits(loaded), logits(model))
        assert {layer.method for layer in lora_layers(loaded).values()} == {method}
    again = save_adapter(own, tmp_path / "again")
    for file in (WEIGHTS, "adapter_config.json"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


def test_pissa_is_plain_lora_of_twice_the_rank_in_its_folder(tmp_path, tiny_llama):
    fresh = deepcopy(tiny_llama)
    model = disturbed(add_adapter(tiny_llama, "pissa", r=2, alpha=3))
    state = torch.get_rng_state()
    folder = save_adapter(model, tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), state)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (4, 6, True)
    assert torch.equal(logits(load_adapter(fresh, folder)), logits(model))
    with pytest.raises(ValueError, match="is of method lora, but the model's own is pissa"):
        load_adapter(model, folder)


@pytest.mark.parametrize("method", RELATIVES)
def test_a_cast_leaves_what_learns_and_its_constants_in_float32(tiny_llama, method):
    model = disturbed(add_adapter(quantize_linears(tiny_llama), method, r=2))
    layer = lora_layers(model)[Q_PROJ]
    before = [tensor.detach().clone() for tensor in (*layer.learned().values(), *layer.buffers(recurse=False))]
    model.bfloat16()
    after = [*layer.learned().values(), *layer.buffers(recurse=False)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("method", RELATIVES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.filterwarnings("ignore:.*are in 4 bits;")
def test_it_is_merged(tmp_path, folder, method, target):
    model, _ = load(folder, dtype=torch.float32, progress=False)
    disturbed(add_adapter(model, method, r=2))
    want = logits(model)
    report = merge(model, tmp_path / "out", target, anyway=True, progress=False)
    assert torch.equal(logits(model), want)
    if target == "dequantised":
        assert report.passes and report.kl < 0.01 * report.adapter_kl  # 16-bit rounding
        merged, _ = load(tmp_path / "out", codebook=None, dtype=torch.float32, progress=False)
        assert (logits(merged) - want).norm() < 0.05 * want.norm()


# ----------------------------------------------------------------------------------------------- LoftQ


@pytest.mark.filterwarnings("ignore:.*are in 4 bits;")
def test_loftq_makes_up_for_what_quantisation_lost(tmp_path, folder):
    """alpha is not r: the best product of rank 2 for the loss, whatever the scaling."""
    model, _ = load(folder, dtype=torch.float32, progress=False)
    original, _ = load(folder, codebook=None, dtype=torch.float32, progress=False)
    fresh = deepcopy(model)
    add_adapter(model, "loftq", r=2, alpha=6)
    for path, layer in lora_layers(model).items():
        assert type(layer) is LoRALinear and layer.scaling == 3
        lost = original.get_submodule(path).weight - decoded(layer.base)
        left = lost - layer.scaling * layer.lora_B @ layer.lora_A
        best = torch.linalg.svdvals(lost)[2:].square().sum().sqrt()
        torch.testing.assert_close(left.norm(), best, rtol=1e-4, atol=0)  # float32 in both
    loaded = load_adapter(fresh, save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.filterwarnings("ignore:.*are in 4 bits;")
def test_loftq_refuses_what_it_cannot_make_up_for(tmp_path, folder, tiny_llama):
    with pytest.raises(ValueError, match="no layer of this model is in 4 bits, so nothing was lost: use lora"):
        add_adapter(deepcopy(tiny_llama), "loftq")
    model, _ = load(folder, dtype=torch.float32, progress=False)
    ql.quantize_folder(folder, tmp_path / "packed", progress=False)
    with pytest.raises(ValueError, match="packed is in 4 bits already: name the original"):
        add_adapter(model, "loftq", source=tmp_path / "packed")
    model.model.layers[0].self_attn.q_proj = Linear4bit(quantize(torch.randn(8, 16)))
    with pytest.raises(ValueError, match=r"q_proj.weight as \(16, 16\), this model as \(8, 16\): name its original"):
        add_adapter(model, "loftq")


# ----------------------------------------------------------------------------------------------- LoRA+


def test_groups_are_those_of_peft(tiny_llama):
    theirs = of_peft(deepcopy(tiny_llama))
    ours = add_lora(tiny_llama, r=4, targets=["q_proj", "down_proj"])
    groups = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16).param_groups
    shapes = {group["lr"]: [p.shape for p in group["params"]] for group in groups if group["params"]}
    made = {1e-3 * group["times"]: [p.shape for p in group["params"]] for group in rate_groups(ours, 16)}
    assert made == shapes


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8])
def test_lora_b_learns_faster_and_resumes_to_the_byte(tmp_path, tiny_llama, tokenizer, bits):
    def model():
        return add_lora(deepcopy(tiny_llama), r=2)

    how = {"lora_plus": 16, "optimizer_bits": bits, "save_every": 2, "lr": 1e-4}
    one = model()
    first = {name: p.detach().clone() for name, p in learned(one).items()}
    train(one, tokenizer, tmp_path / "one", **how | {"steps": 1})
    moves = {name: (p - first[name]).abs().max().item() for name, p in learned(one).items()}
    assert {round(move / 1e-4) for name, move in moves.items() if name.endswith("lora_B")} == {16}  # Adam's first step
    whole = train(model(), tokenizer, tmp_path / "whole", **how)
    stopped = Training(model(), tokenizer, EXAMPLES, tmp_path / "cut", whole.settings, progress=False)
    for line in stopped:
        if line["step"] == 3:
            stopped.stop()
    resumed = train(model(), tokenizer, tmp_path / "cut", **how, resume=True)
    assert (whole.adapter / WEIGHTS).read_bytes() == (resumed.adapter / WEIGHTS).read_bytes()


def test_lora_plus_needs_a_lora_b(tmp_path, tiny_llama, tokenizer):
    model = add_adapter(tiny_llama, "prompt", virtual_tokens=2)
    with pytest.raises(ValueError, match="lora_plus=16 is for lora_B, but method prompt has none: set lora_plus=1"):
        train(model, tokenizer, tmp_path / "run", lora_plus=16)
    with pytest.raises(ValueError, match="lora_plus=0 is not allowed"):
        Settings(lora_plus=0)


@pytest.mark.slow
def test_a_run_from_before_lora_plus_can_be_resumed(tmp_path, tiny_llama, tokenizer):
    run = train(add_lora(tiny_llama, r=2), tokenizer, tmp_path / "run", steps=1)
    now = json.loads((run.folder / "settings.json").read_text())
    before = {name: value for name, value in now.items() if name != "lora_plus"}
    check_same_run(run.folder, before, now, [])
    with pytest.raises(ValueError, match="lora_plus: 1 in the checkpoint, 16 now"):
        check_same_run(run.folder, before, now | {"lora_plus": 16}, [])


def test_a_ledger_refuses_what_it_has_no_rows_for(tiny_llama):
    with pytest.raises(ValueError, match="dropout=0.1 keeps what no row counts with method='dora'"):
        measure_memory(add_adapter(tiny_llama, "dora", r=2, dropout=0.1))


# ----------------------------------------------------------------------------------------------- ranks by layer


def test_each_layer_has_its_rank_and_peft_reads_them(tmp_path, tiny_llama):
    plain = deepcopy(tiny_llama)
    ranks = {r"layers\.0\..*q_proj": 3, "mlp.up_proj": 5, ".*": 2}
    ours = disturbed(add_adapter(tiny_llama, "dora", r=ranks, alpha=6))
    found = {path: layer.r for path, layer in lora_layers(ours).items()}
    wanted = {path: 3 if path == Q_PROJ else 5 if path.endswith("mlp.up_proj") else 2 for path in found}
    assert found == wanted
    theirs = with_peft(plain, save_adapter(ours, tmp_path / "adapter"))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"q_proj": 2}, r"r has no rank for model.layers.0.self_attn.k_proj: name it, add '.\*'"),
        ({".*": 2, "q_proj": 4}, r"r\['q_proj'\] matches no layer that an earlier name leaves"),
        ({"qproj": 4, ".*": 2}, r"r\['qproj'\] matches no layer"),
        ({"q_proj": 0, ".*": 2}, "r=0 is not allowed"),
        ({"q_proj": "4", ".*": 2}, "r='4' is not allowed"),
        ({"(": 4}, "is not a pattern of layers: mend it"),
        ({4: 4}, "is not a pattern of layers: give names"),
        ({}, "r has no rank for"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(tiny_llama, ranks, message):
    with pytest.raises(ValueError, match=message):
        add_lora(tiny_llama, r=ranks)
    assert not any(isinstance(module, LoRALinear) for module in tiny_llama.modules())


# ----------------------------------------------------------------------------------------------- the default model


@pytest.mark.slow
def test_smollm2_answers_as_with_peft(tmp_path):
    packed, tokenizer = load("smollm2-135m", dtype=torch.float32, progress=False)
    plain, _ = load("smollm2-135m", codebook=None, dtype=torch.float32, progress=False)
    for path, layer in packed.named_modules():
        if isinstance(layer, Linear4bit):
            plain.get_submodule(path).weight.data = decoded(layer)
    ids = tokenizer("def add(a, b):\n    return", return_tensors="pt")["input_ids"]
    before = logits(packed, ids)
    sizes = dict.fromkeys(("lora", "rslora", "dora"), {"r": 4, "alpha": 6})  # PiSSA is LoRA to PEFT
    for method, options in (sizes | dict.fromkeys(("prompt", "prefix"), {"virtual_tokens": 5})).items():
        ours = add_adapter(deepcopy(packed), method, **options)
        draws = torch.Generator().manual_seed(1)
        for parameter in learned(ours).values():
            parameter.data *= 1 + 0.05 * torch.randn(parameter.shape, generator=draws)
            parameter.data += 0.004 * torch.randn(parameter.shape, generator=draws)
        theirs = with_peft(plain, save_adapter(ours, tmp_path / method))
        got, want = logits(ours, ids), logits(theirs, ids)[:, -ids.shape[1] :]  # PEFT keeps the rows of a prompt
        plain = theirs.unload() if method in sizes else theirs.get_base_model()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-3, msg=method)  # float32, 30 layers
        assert (got - before).abs().max() > 0.1
