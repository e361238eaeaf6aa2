"""LoRA on experts: a pair for each, read by PEFT with the same logits, trained where tokens go, merged, or refused."""

import json
import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import qlora_lab as ql
from qlora_lab.adapters.adapter import adapters, learned, remove_adapter
from qlora_lab.adapters.expert_lora import LoRAStack
from qlora_lab.adapters.lora import add_lora
from qlora_lab.adapters.peft_format import load_adapter, save_adapter
from qlora_lab.adapters.targets import choose_targets
from qlora_lab.export.layerwise import as_float
from qlora_lab.export.merge import TARGETS
from qlora_lab.export.merge_folders import Folders, merge_folders
from qlora_lab.model.experts4bit import Experts4bit, PlainStack, pack_stack, stack_modules
from qlora_lab.model.layer_kinds import turned
from qlora_lab.quant.plan import Candidate
from qlora_lab.quant.stack import quantize_stack
from qlora_lab.train.identity import base_checksum
from tests.model.families import tiny, with_decoded_weights
from tests.model.test_experts import IDS, NEAR, loaded, saved

pytestmark = pytest.mark.usefixtures("one_thread")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("GptOss", "Llama4Text", "Qwen3Moe")]


def active(model, r=3, std=0.1, **options):
    """Adapters that change every answer, as after training."""
    add_lora(model, **{"r": r, "targets": "all"} | options)
    generator = torch.Generator().manual_seed(1)
    for layer in adapters(model).values():
        layer.lora_B.data.normal_(std=std, generator=generator)
    return model


def by_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about rank patterns of parameters
        return PeftModel.from_pretrained(model, folder).eval()


def made_by_peft(model, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(**config)).eval()


def near(ours, theirs):
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-5, atol=2e-5)


# ------------------------------------------------------------------------------------------------------------ targets


def test_names_for_several_layers():
    model = tiny("Qwen2Moe", num_hidden_layers=1)  # with a shared expert, and its gate
    mlp = "model.layers.0.mlp"
    attention = [f"model.layers.0.self_attn.{name}" for name in ATTENTION]
    shared = [f"{mlp}.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    stacks = [f"{mlp}.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    expected = {
        "all-linear": attention + shared,
        "attention": attention,
        "experts": stacks,
        "shared-experts": shared,
        "all": attention + shared + stacks,
        "gate_up_proj": stacks[:1],
        "experts.down_proj": stacks[1:],
        "down_proj": shared[2:],  # the linear layer alone, as before experts could be adapted
    }
    assert {name: choose_targets(model, name) for name in expected} == expected
    assert choose_targets(model, ["experts", "q_proj", stacks[0]]) == attention[:1] + stacks


@pytest.mark.parametrize("name, lacks", [("experts", "experts in one tensor"), ("shared-experts", "shared experts")])
def test_a_model_without_experts_is_told(tiny_llama, name, lacks):
    with pytest.raises(ValueError, match=f"LlamaForCausalLM has no {lacks}: choose a model with some"):
        add_lora(tiny_llama, targets=["q_proj", name])


@pytest.mark.parametrize(
    "method, options, fault",
    [
        ("dora", {}, "dora cannot adapt experts in one tensor: use lora or rslora"),
        ("pissa", {}, "pissa cannot adapt experts in one tensor: use lora or rslora"),
        ("lora", {"dropout": 0.1}, "dropout is 0.1, but PEFT has none beside experts in one tensor: set dropout=0"),
        ("loftq", {}, "loftq has no option 'targets'"),
    ],
)
def test_what_experts_cannot_take_is_refused_and_changes_nothing(method, options, fault):
    model = tiny("Mixtral", num_hidden_layers=1)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=fault):
        ql.add_adapter(model, method, targets="all", **options)
    assert dict(model.named_modules()) == modules


# --------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_each_expert_adds_its_own_product(method):
    """By hand, on the family's own weights: W_e + scaling B_e A_e. And the adapter comes out without a trace."""
    model = tiny("Mixtral", num_hidden_layers=1)
    before, keys = model(IDS).logits, list(model.state_dict())
    by_hand = deepcopy(model)
    ql.add_adapter(model, method, r=4, alpha=8, targets="experts")
    torch.testing.assert_close(model(IDS).logits, before, **NEAR)  # B is zero; the products are summed in another order
    for path, layer in adapters(model).items():
        assert layer.lora_A.shape[:2] == (4, 4) and layer.lora_B.shape[0] == 4
        layer.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        scaling = 8 / 4 if method == "lora" else 8 / 2
        by_hand.get_parameter(path).data += scaling * layer.lora_B.data @ layer.lora_A.data
    torch.testing.assert_close(model(IDS).logits, by_hand(IDS).logits, **NEAR)
    assert (by_hand(IDS).logits - before).abs().max() > 0.1
    remove_adapter(model)
    assert torch.equal(model(IDS).logits, before) and list(model.state_dict()) == keys
    assert not any(isinstance(module, Experts4bit) for module in model.modules())


def test_an_adapter_beside_one_stack_alone_leaves_the_other_a_parameter():
    model = add_lora(tiny("Mixtral", num_hidden_layers=1), r=2, targets="experts.down_proj")
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.down_proj.base, PlainStack) and isinstance(experts.gate_up_proj, nn.Parameter)
    assert len(stack_modules(model)) == 2


@pytest.mark.long
@pytest.mark.parametrize("name", ["Mixtral", *OTHERS])
def test_training_moves_adapters_of_routed_experts_alone(tmp_path, tokenizer, name):
    """Frozen bytes keep their bits, the loss falls, and an expert without a token gets a gradient of zeros."""
    folder, _ = saved(name, tmp_path, tokenizer)
    model = add_lora(loaded(folder), r=4, targets="all")
    before, start = base_checksum(model), {n: p.clone() for n, p in learned(model).items()}
    assert not any("router" in n or ".gate." in n or "shared_expert_gate" in n for n in start)
    few = IDS[:, :2]  # two tokens: some experts have none
    model(input_ids=few, labels=few).loss.backward()
    for path, layer in adapters(model).items():
        if isinstance(layer, LoRAStack) and "layers.0" in path:
            moved = [bool(gradient.any()) for gradient in layer.lora_B.grad]
            assert len(moved) == len(layer.lora_B) and any(moved)
            assert name == "Qwen3Moe" or not all(moved)
    model.zero_grad()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
    losses = []
    for _ in range(4):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] and base_checksum(model) == before
    assert all(not torch.equal(p, start[n]) for n, p in learned(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_sum(dtype):
    """Of a stack in 4 bits, beside which the CPU adds both products before it rounds once."""
    owner = nn.ModuleDict({"experts": tiny("Mixtral", num_hidden_layers=1).model.layers[0].mlp.experts})
    weight = owner["experts"].down_proj.data
    stack = pack_stack(owner, "experts.down_proj", quantize_stack(weight, block_size=16))
    layer = LoRAStack(stack, 3, 6, generator=torch.Generator().manual_seed(0))
    layer.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    grads = []
    for multiply in (
        lambda: layer(x, 2),
        lambda: x @ (as_float(stack.weight)[2] + 2 * layer.lora_B[2] @ layer.lora_A[2]).to(dtype).t(),
    ):
        y = multiply()
        grads.append([y, *torch.autograd.grad(y.float().square().sum(), [x, layer.lora_A, layer.lora_B])])
    wide = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.5}  # 8 bits of bf16
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), **wide)
    assert not grads[0][2][:2].any() and grads[0][2][2].any()


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.long
@pytest.mark.parametrize("targets", ["all", pytest.param("experts.gate_up_proj", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["Mixtral", *OTHERS])
def test_peft_reads_it_and_what_peft_saves_is_read_here(tmp_path, tokenizer, name, targets):
    """On the decoded weights in the plain transformers model. A rank of its own for one stack comes along."""
    folder, theirs = saved(name, tmp_path, tokenizer)
    r = {r"layers\.0\..*experts\.gate_up_proj": 2, ".*": 4}
    ours = active(loaded(folder), r=r, targets=targets)
    save_adapter(ours, tmp_path / "adapter")
    assert all(t.dim() == 2 for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values())
    plain = by_peft(with_decoded_weights(theirs, ours), tmp_path / "adapter")
    near(ours, plain)
    plain.save_pretrained(tmp_path / "again")
    back = load_adapter(loaded(folder), tmp_path / "again")
    assert torch.equal(back(IDS).logits, ours(IDS).logits)
    assert all(torch.equal(p, learned(back)[n]) for n, p in learned(ours).items())


STACKS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.parametrize(
    "config, method",
    [
        (STACKS, "lora"),
        (STACKS | {"use_rslora": True}, "rslora"),
        ({"target_modules": ["q_proj", "w1", "w2", "w3"]}, "lora"),  # PEFT makes two of them one, of twice the rank
    ],
)
def test_an_adapter_that_peft_made_is_read(tmp_path, config, method):
    plain = tiny("Mixtral", num_hidden_layers=1)
    ours = deepcopy(plain)
    theirs = made_by_peft(plain, r=4, lora_alpha=8, init_lora_weights=False, **config)
    theirs.save_pretrained(tmp_path / "adapter")
    near(load_adapter(ours, tmp_path / "adapter"), theirs)
    assert {layer.method for layer in adapters(ours).values()} == {method} and len(adapters(ours)) == 3


def test_an_adapter_of_a_router_is_refused(tmp_path):
    plain = tiny("Mixtral", num_hidden_layers=1)
    made_by_peft(deepcopy(plain), r=4, target_modules="all-linear").save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match="mlp.gate is of type MixtralTopKRouter here: only linear layers and experts are"
    ):
        load_adapter(plain, tmp_path / "adapter")


def test_names_that_peft_takes_for_experts_are_written_as_parameters(tmp_path):
    """A dense layer of Qwen3-MoE: PEFT adapts the experts when it reads up_proj among the modules."""
    model = tiny("Qwen3Moe", mlp_only_layers=[0])
    plain = deepcopy(model)
    active(model, r={r".*\.gate_proj": 2, ".*": 3}, targets="all-linear")
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(ATTENTION)
    assert config["target_parameters"] == ["down_proj.weight", "gate_proj.weight", "up_proj.weight"]
    near(model, by_peft(deepcopy(plain), tmp_path / "adapter"))
    assert torch.equal(load_adapter(plain, tmp_path / "adapter")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "add", [add_lora, partial(ql.add_adapter, method="dora"), partial(ql.add_adapter, method="pissa")]
)
def test_dropout_that_only_peft_refuses_is_warned_of(tmp_path, add):
    model = tiny("Qwen3Moe", mlp_only_layers=[0])
    plain = deepcopy(model)
    with pytest.warns(
        UserWarning, match="PEFT will not read .* dropout=0.1 beside model.layers.0.mlp.gate_proj"
    ) as told:
        add(model, r=2, dropout=0.1, targets="all-linear")
    assert told[0].filename == __file__
    save_adapter(model, tmp_path / "adapter")
    if add is add_lora:
        with pytest.raises(ValueError, match="does not work with lora_dropout"):  # when PEFT does, the warning can go
            by_peft(plain, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add(tiny("Qwen3Moe", mlp_only_layers=[0]), r=2, dropout=0.1, targets="attention")
        add(tiny("Qwen3Moe", mlp_only_layers=[0]), r=2, targets="all-linear")


KEY = "base_model.model.model.layers.0.mlp.experts."


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda t, c: t.pop(f"{KEY}base_layer.lora_A.weight"), "has other tensors for model.layers.0.mlp.experts than"),
        (lambda t, c: c.update(target_parameters=["experts.down_proj"]), "which is down_proj there"),
        (lambda t, c: c.update(target_parameters=None), "which is none there"),
        (
            lambda t, c: t.update({f"{KEY}lora_A.weight": torch.ones(10, 32)}),
            r"down_proj has \(10, 32\) and \(16, 12\), but 4 experts need \(rank times 4, inputs\)",
        ),
        (lambda t, c: c.update(target_parameters="experts.down_proj"), "it must be a list of names of parameters"),
        (lambda t, c: c.update(target_parameters=[5]), r"target_parameters=\[5\]: it must be a list of names"),
        (lambda t, c: c.update(r=2), r"gate_up_proj.lora_A has shape \(4, 3, 16\), but with r=2 .*mend r or rank_patt"),
        (lambda t, c: c.update(use_dora=True), "dora cannot adapt experts in one tensor"),
        (lambda t, c: c.update(lora_dropout=0.1), "dropout is 0.1, but PEFT has none beside experts"),
    ],
)
def test_faults_in_a_file_are_named_and_change_nothing(tmp_path, change, fault):
    model = tiny("Mixtral", num_hidden_layers=1)
    folder = save_adapter(active(deepcopy(model), targets="experts"), tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=fault):
        load_adapter(model, folder)
    assert dict(model.named_modules()) == modules


@pytest.mark.long
def test_state_dict_and_copies_hold_the_packed_stacks_of_adapted_experts(tmp_path, tokenizer):
    folder, _ = saved("Mixtral", tmp_path, tokenizer)
    ours = active(loaded(folder))
    other = add_lora(loaded(folder, block_size=32), r=3, targets="all", seed=5)
    other.load_state_dict(ours.state_dict())
    for again in (other, deepcopy(ours)):
        assert torch.equal(again(IDS).logits, ours(IDS).logits)


# ------------------------------------------------------------------------------------------- many, merged, and trained


def test_a_bank_switches_adapters_of_experts_but_does_not_mix_rows(tmp_path):
    model = tiny("Mixtral", num_hidden_layers=1)
    want = {}
    for name, std in (("a", 0.1), ("b", 0.2)):
        own = active(deepcopy(model), std=std)
        want[name] = own(IDS).logits
        save_adapter(own, tmp_path / name)
    base = model(IDS).logits
    bank = ql.AdapterBank(model)
    for name in want:
        bank.add(name, tmp_path / name)
    for name in ("b", "a", None):
        bank.use(name)
        assert torch.equal(model(IDS).logits, want.get(name, base))
    with pytest.raises(ValueError, match="'a' adapts experts, to which rows come mixed: use one adapter at a time"):
        bank.check_rows(["a", None])


@pytest.mark.parametrize("target", [TARGETS[0], *(pytest.param(t, marks=pytest.mark.slow) for t in TARGETS[1:])])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in ("Mixtral", "GptOss", "Llama4Text")])
def test_a_merge_takes_in_what_experts_learned(tmp_path, tokenizer, name, target):
    """Against W_e + scaling B_e A_e by hand; and from folders the same bytes."""
    folder, theirs = saved(name, tmp_path, tokenizer)
    ours = active(loaded(folder), targets="experts")
    save_adapter(ours, tmp_path / "adapter")
    report = ql.merge(ours, tmp_path / "merged", target, source=folder, anyway=True, progress=False)
    options = Candidate("nf4", 16, True)
    folders = Folders(folder, tmp_path / "adapter")
    again = merge_folders(folders, tmp_path / "again", target, options, anyway=True, progress=False)
    one, two = (load_file(next((tmp_path / place).glob("*.safetensors"))) for place in ("merged", "again"))
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    assert set(report.layers) == set(again.layers) == set(stack_modules(ours))
    merged = loaded(tmp_path / "merged", **({} if target == "requantised" else {"codebook": None}))
    for path, layer in adapters(ours).items():
        base = layer.base.weight if target != "original" else theirs.get_parameter(path)
        base = as_float(base) if target != "original" else turned(theirs, path, base)
        want = base + layer.scaling * (layer.lora_B @ layer.lora_A)
        if target == "requantised":
            found = as_float(merged.get_submodule(path).weight)
            error = (found - want).abs().amax(-1) / want.abs().amax(-1)
            assert error.max() < 0.2  # half of NF4's widest gap is 0.15 of a block's largest weight
            assert report.layers[path].nibbles_changed > 0.1
        else:
            found = turned(merged, path, merged.get_parameter(path))
            assert torch.equal(found, want.bfloat16().float())
            assert report.layers[path].cosine > 0.99
