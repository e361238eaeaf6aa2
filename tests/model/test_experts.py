"""Experts in 4 bits: found by structure, decoded only where a token goes, equal to transformers, frozen, and saved."""

import pickle
import warnings
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_lab as ql
from qlora_lab.adapters.lora import adapters, add_lora
from qlora_lab.export.merge import TARGETS
from qlora_lab.export.xray import Checkpoint, scanned
from qlora_lab.kernels import product
from qlora_lab.model import product_4bit
from qlora_lab.model.experts import gates, layout_of, stacks_of
from qlora_lab.model.experts4bit import Experts4bit, Stack4bit
from qlora_lab.model.linear4bit import Linear4bit, linears_to_quantise
from qlora_lab.model.load import load
from qlora_lab.model.model_files import ModelError
from qlora_lab.model.quantised import options_of, put, quantised
from qlora_lab.model.quantized_folder import folder_in_4_bits, quantize_folder, read_by
from qlora_lab.model.share_in_4_bits import in_4_bits
from qlora_lab.quant.plan import Candidate, Plan
from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.quant.stack import dequantize_stack, quantize_stack, stack_to_tensors
from qlora_lab.train.identity import base_checksum
from tests.model.families import tiny, with_decoded_weights

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(3, 30)[None]
NEAR = {"rtol": 1e-4, "atol": 1e-5}  # float32 products, summed in another order
# GPT-OSS lies turned and has biases; every other layout has a slow test, and a fast one where it differs
FAMILIES = [
    "GptOss",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Llama4Text")),
]
WIDTHS = (torch.float32, torch.bfloat16)
OPTIONS = Candidate("nf4", 16, True)


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path, tokenizer):
    """A folder of that family, and its model as transformers has it."""
    return saved(request.param, tmp_path, tokenizer)


def saved(name, tmp_path, tokenizer):
    model = tiny(name, vocab_size=280, initializer_range=0.3)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def loaded(folder, **options):
    return load(folder, device="cpu", progress=False, **({"dtype": torch.float32, "block_size": 16} | options))[0]


def packed_stacks(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, Stack4bit)}


# ---------------------------------------------------------------------------------------------------------- structure


def test_experts_are_found_by_structure_and_routers_keep_their_precision(family):
    folder, theirs = family
    ours = loaded(folder)
    assert len(stacks_of(theirs)) == len(packed_stacks(ours)) == 4 and not stacks_of(ours)  # two in each of two layers
    assert gates(theirs) == gates(ours)
    kept = {path for path, m in ours.named_modules() if type(m) is nn.Linear} - {"lm_head"}
    expected = {"Qwen2MoeForCausalLM": {f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1)}}
    assert kept == expected.get(type(theirs).__name__, set())
    routers = [name for name, p in theirs.named_parameters() if "router" in name or name.endswith("mlp.gate.weight")]
    assert len(routers) >= 2
    for name in routers:
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name))


def test_what_only_looks_like_experts_is_left_alone():
    class Own(nn.Module):
        """The shapes of experts, and a routing of its own."""

        def __init__(self, experts=4, act=nn.functional.silu):
            super().__init__()
            self.num_experts = experts
            self.act_fn = act
            self.gate_up_proj = nn.Parameter(torch.ones(4, 8, 12))
            self.down_proj = nn.Parameter(torch.ones(4, 6, 8))

        def forward(self, hidden, index, weights):
            return hidden

    class Sorted(Own):
        def forward(self, hidden):
            return hidden

    assert layout_of(Own()) is None and layout_of(Sorted(experts=5)) is None
    assert layout_of(Sorted(act=torch.sigmoid)) is None  # a row of zeros has a gradient there
    assert layout_of(Sorted()).sorted and layout_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("name", ["LongcatFlash", "JetMoe"])
def test_routers_beside_unknown_experts_keep_their_precision(tmp_path, tokenizer, name):
    folder, theirs = saved(name, tmp_path, tokenizer)
    routers = {path for path, module in theirs.named_modules() if isinstance(module, nn.Linear) and "router" in path}
    assert routers and not stacks_of(theirs) and routers <= gates(theirs)
    with pytest.warns(UserWarning, match="of the weights outside embeddings and head are in 4 bits"):
        ours = loaded(folder)
    assert all(type(ours.get_submodule(path)) is nn.Linear for path in routers)
    want = with_decoded_weights(theirs, ours)(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(ours(input_ids=IDS, use_cache=False).logits, want, **NEAR)


def test_a_plain_gate_is_told_by_its_outputs_where_experts_are_unknown():
    model = nn.Module()
    model.gate, model.up_proj = nn.Linear(8, 6), nn.Linear(8, 16)
    assert gates(model) == set()  # no configuration
    model.config = SimpleNamespace(n_routed_experts=6)
    assert gates(model) == {"gate"}
    model.config = SimpleNamespace(num_experts=None, num_local_experts=1)  # one output for one expert says nothing
    model.gate = nn.Linear(8, 1)
    assert gates(model) == set()


# --------------------------------------------------------------------------------------------------------- arithmetic


def test_each_expert_is_quantised_alone_along_its_inputs(family):
    folder, theirs = family
    for path, module in packed_stacks(loaded(folder)).items():
        stack = theirs.get_parameter(path)
        assert module.turned is layout_of(theirs.get_submodule(path.rpartition(".")[0])).turned
        for expert, matrix in enumerate(stack):
            alone = quantize(matrix.t() if module.turned else matrix, "nf4", 16, True)
            assert torch.equal(module.weight[expert].packed, alone.packed)
            assert torch.equal(module.weight[expert].absmax, alone.absmax)


@pytest.mark.parametrize("implementation", [pytest.param("eager", marks=pytest.mark.slow), "grouped_mm"])
def test_logits_are_those_of_the_decoded_weights(family, implementation):
    folder, theirs = family
    ours = loaded(folder)
    original = theirs(IDS).logits
    theirs.config._experts_implementation = implementation
    want = with_decoded_weights(theirs, ours)(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, want, **NEAR)
    assert (want - original).abs().max() > 100 * NEAR["atol"]  # quantising moved them, so the comparison can fail
    ours.config._experts_implementation = implementation  # packed experts do not read it
    torch.testing.assert_close(ours(IDS).logits, want, **NEAR)


@pytest.mark.parametrize("name", ["Mixtral", "Llama4Text"])
def test_logits_of_other_layouts_are_those_of_the_decoded_weights(tmp_path, tokenizer, name):
    folder, theirs = saved(name, tmp_path, tokenizer)
    ours = loaded(folder)
    torch.testing.assert_close(ours(IDS).logits, with_decoded_weights(theirs, ours)(IDS).logits, **NEAR)


def test_gradients_are_those_of_the_decoded_weights(family):
    folder, theirs = family
    ours = loaded(folder)
    theirs = with_decoded_weights(theirs, ours)
    gradients = []
    for model in (ours, theirs):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=IDS, use_cache=False).loss.backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_one_stack_alone_may_be_packed(family):
    folder, theirs = family
    original = theirs(IDS).logits
    paths = [path for path in stacks_of(theirs) if path.endswith("down_proj")]
    stacks = stacks_of(theirs)
    ours = deepcopy(theirs)
    for path in paths:
        put(ours, path, quantised(ours, path, stacks[path], OPTIONS))
    want = with_decoded_weights(theirs, ours)(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, want, **NEAR)
    assert not torch.allclose(want, original, atol=1e-3)


@pytest.mark.parametrize("name", ["GptOss", "Llama4Text"])
def test_bf16_and_autocast(tmp_path, tokenizer, name):
    folder, _ = saved(name, tmp_path, tokenizer)
    experts = {
        dtype: next(m for m in loaded(folder, dtype=dtype).modules() if isinstance(m, Experts4bit)) for dtype in WIDTHS
    }
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    routing = () if name == "Llama4Text" else (torch.tensor([[0], [1]] * 4), torch.full((8, 1), 0.5))
    want = experts[torch.float32](x.float(), *routing)
    with torch.autocast("cpu", torch.bfloat16):
        near = experts[torch.float32](x.float(), *routing)
    narrow = experts[torch.bfloat16](x, *(t.bfloat16() if t.is_floating_point() else t for t in routing))
    assert narrow.dtype == torch.bfloat16
    for other in (near, narrow):  # sums of 16 and 32 products, of factors rounded to 8 bits
        torch.testing.assert_close(other.float(), want, rtol=0.05, atol=0.05 * want.abs().max().item())


@pytest.mark.parametrize("width", [39, 41])
def test_an_input_of_the_wrong_width_or_dtype_is_refused(width):
    stack = Stack4bit(quantize_stack(torch.ones(2, 8, 40), block_size=16))
    with pytest.raises(ValueError, match=rf"input has shape \(3, {width}\), but its last dimension must be 40"):
        stack(torch.ones(3, width), 1)
    with pytest.raises(TypeError, match="input is torch.float64: cast it to float32"):
        stack(torch.ones(3, 40, dtype=torch.float64), 1)


def test_no_tokens(tmp_path, tokenizer):
    folder, _ = saved("Mixtral", tmp_path, tokenizer)
    experts = next(m for m in loaded(folder).modules() if isinstance(m, Experts4bit))
    assert experts(torch.ones(0, 16), torch.ones(0, 2, dtype=torch.long), torch.ones(0, 2)).shape == (0, 16)


# ------------------------------------------------------------------------------------------------- what is decoded


def test_only_routed_experts_are_decoded(family, monkeypatch):
    folder, theirs = family
    ours = loaded(folder)
    used = []
    forward = product_4bit.forward
    monkeypatch.setattr(product_4bit, "forward", lambda x, weight: used.append((weight, len(x))) or forward(x, weight))
    ours(IDS[:, :1])  # one token
    k = getattr(theirs.config, "num_experts_per_tok", 1)
    for path, module in packed_stacks(ours).items():
        rows = [n for weight, n in used if any(weight is member for member in module.weight.members)]
        assert rows == [1] * k and k < len(module.weight), path


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside the `with` block hold at once, beside those of a model."""

    def __init__(self, model):
        super().__init__()
        self.model = {tensor.untyped_storage().data_ptr() for tensor in (*model.buffers(), *model.parameters())}
        self.live = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.live = {a: (ref, n) for a, (ref, n) in self.live.items() if not ref.expired()}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() in self.model:  # a view of packed bytes
                    continue
                self.live.setdefault(storage.data_ptr(), (StorageWeakRef(storage), storage.nbytes()))
        self.most = max(self.most, sum(n for _, n in self.live.values()))
        return out


HIDDEN, INNER, EXPERTS = 64, 512, 16
MATRIX = 4 * HIDDEN * 2 * INNER  # bytes of one expert's larger matrix in float32: the panel that is decoded


def peak_of_a_forward(experts, tokens=20, gradient=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_(gradient)
    index = torch.tensor([[1, 2]] * tokens)  # two of 16 experts are active
    experts(x, index, torch.full((tokens, 2), 0.5))  # the first products of a process race, on matrices of their own
    vars(product._local).clear()  # a panel that is kept from earlier products would not be seen
    with Peak(experts) as peak:
        y = experts(x, index, torch.full((tokens, 2), 0.5))
        if gradient:
            y.sum().backward()
    return peak.most


@pytest.fixture
def experts():
    model = tiny("Mixtral", hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    experts = Experts4bit(model.model.layers[0].mlp.experts)
    owner = nn.ModuleDict({"experts": experts})
    for name in ("gate_up_proj", "down_proj"):
        stack = experts._parameters[name]
        put(owner, f"experts.{name}", quantised(owner, f"experts.{name}", stack, Candidate("nf4", 64, True)))
    return experts


@pytest.mark.usefixtures("with_kernels")  # the readable functions decode a whole matrix, through wider numbers
@pytest.mark.parametrize("gradient", [False, True])
def test_a_forward_holds_a_panel_above_the_packed_model(experts, gradient, monkeypatch):
    """Two active experts may hold two panels each; one buffer serves all. And the bound can fail."""
    # float32 activations of 40 pairs of token and expert, of which 20 are inside an expert, and their gradients
    rows = 4 * (40 * 4 * HIDDEN + 20 * 4 * INNER) * (1 + gradient)
    most = peak_of_a_forward(experts, gradient=gradient)
    assert MATRIX < most < MATRIX + rows < 4 * MATRIX

    def whole(self, x, expert):
        return x @ dequantize_stack(self.weight, x.dtype)[expert].t()

    monkeypatch.setattr(Stack4bit, "forward", whole)
    assert peak_of_a_forward(experts, gradient=gradient) > EXPERTS * MATRIX


@pytest.mark.usefixtures("with_kernels")
def test_a_forward_of_a_model_holds_less_than_the_active_experts_panels(monkeypatch):
    """Equal tokens have equal values, so attention leaves them equal, and the router sends all to the same two."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS}
    model = tiny("Mixtral", **sizes)
    for path, options in options_of(model, Candidate("nf4", 64, True), None).items():
        kept = model.state_dict()
        put(model, path, quantised(model, path, kept.get(path, kept.get(f"{path}.weight")), options))
    used = []
    forward = Stack4bit.forward
    monkeypatch.setattr(Stack4bit, "forward", lambda stack, x, expert: used.append(expert) or forward(stack, x, expert))
    ids = torch.full((1, 20), 7)
    with torch.no_grad():
        model(ids)  # products race, and matrices of the race are none of the model's
        assert len(used) == 2 * 2 * 2  # two of 16 experts in each of two layers, by two matrices each
        vars(product._local).clear()
        with Peak(model) as peak:
            model(ids)
    panels = 2 * (MATRIX + MATRIX // 2)  # two active experts, and both matrices of each
    assert MATRIX < peak.most < panels


def test_backward_keeps_no_decoded_weight(experts):
    kept = []
    x = torch.ones(3, HIDDEN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        experts(x, torch.tensor([[1, 2]] * 3), torch.full((3, 2), 0.5))
    assert kept and max(kept) < MATRIX / 10


# ---------------------------------------------------------------------------------------------- training and adapters


def test_three_steps_leave_the_frozen_weights_alone(family):
    folder, _ = family
    model = add_lora(loaded(folder), r=4)
    assert not any("experts" in path or "shared_expert_gate" in path for path in adapters(model))
    before = base_checksum(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0] and base_checksum(model) == before
    stack = next(iter(packed_stacks(model).values())).weight
    stack.packed[0, 0] ^= 1
    assert base_checksum(model) != before  # it covers the experts


@pytest.mark.parametrize("name", ["Mixtral", pytest.param("Qwen3Moe", marks=pytest.mark.slow)])
def test_peft_gives_the_same_logits_on_the_plain_model(tmp_path, tokenizer, name):
    folder, theirs = saved(name, tmp_path, tokenizer)
    ours = add_lora(loaded(folder), r=4)
    for layer in adapters(ours).values():
        layer.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    ql.save_adapter(ours, tmp_path / "adapter")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT's own
        plain = PeftModel.from_pretrained(with_decoded_weights(theirs, ours), tmp_path / "adapter").eval()
        torch.testing.assert_close(ours(IDS).logits, plain(input_ids=IDS).logits, **NEAR)


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.long
def test_a_folder_comes_back_as_it_was_quantised(family, tmp_path):
    folder, theirs = family
    out = quantize_folder(folder, tmp_path / "small", "nf4", 16, progress=False)
    assert "bitsandbytes packs linear layers alone, and model.layers.0." in read_by(out)
    assert folder_in_4_bits(out) == in_4_bits(loaded(out))
    ours, mapped = loaded(folder), loaded(out)
    assert base_checksum(ours) == base_checksum(mapped)
    # where router weights lie in memory may decide in which order a product adds them
    torch.testing.assert_close(ours(IDS).logits, mapped(IDS).logits, **NEAR)
    assert ours.num_parameters() == mapped.num_parameters() == theirs.num_parameters()


@pytest.mark.long
def test_without_double_quantization_and_with_another_table(tmp_path, tokenizer):
    folder, _ = saved("GptOss", tmp_path, tokenizer)
    out = quantize_folder(folder, tmp_path / "small", "int4", 32, False, progress=False)
    asked = {"codebook": "int4", "block_size": 32, "double_quant": False}
    assert base_checksum(loaded(folder, **asked)) == base_checksum(loaded(out, **asked))


def test_xray_counts_stacks_and_finds_no_fault_in_them(tmp_path, tokenizer):
    folder, _ = saved("Mixtral", tmp_path, tokenizer)
    checkpoint = Checkpoint(quantize_folder(folder, tmp_path / "small", "nf4", 16, progress=False))
    assert len(checkpoint.stacks) == 4 and len(checkpoint.tensors) == 8 and scanned(checkpoint, progress=False) == []
    assert all(name in checkpoint.plain for stack in checkpoint.stacks for name in (stack, f"{stack}.stack_state"))


@pytest.mark.parametrize(
    "part, damage, fault",
    [
        (".nested_absmax", lambda part: part[1].fill_(torch.nan), "NaN or infinity in its nested constants"),
        ("", lambda codes: codes.set_(codes[:, :-1].contiguous()), "entries, but shape"),
        (".nested_offset", lambda part: part[1].fill_(-1), "nested_offset=-1, but it is a mean of magnitudes"),
        (".absmax", None, "absmax is missing: the checkpoint is incomplete"),
    ],
)
def test_xray_names_the_faults_of_a_stack(tmp_path, part, damage, fault):
    weight = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(0))
    stack = quantize_stack(weight, double_quant=True)
    tensors = {name: part.clone() for name, part in stack_to_tensors(stack, "w").items()}
    damage(tensors[f"w{part}"]) if damage else tensors.pop(f"w{part}")
    save_file(tensors, tmp_path / "model.safetensors")
    (found,) = scanned(Checkpoint(tmp_path / "model.safetensors"), progress=False)
    assert found.startswith("w") and fault in found


@pytest.mark.slow  # four models are loaded
@pytest.mark.parametrize("with_experts", [False, True])
def test_a_plan_decides_linear_layers_and_experts_too_if_it_names_them(tmp_path, tokenizer, with_experts):
    folder, theirs = saved("Mixtral", tmp_path, tokenizer)
    linears = {path: layer.weight.numel() for path, layer in linears_to_quantise(theirs).items()}
    chosen, numel = dict.fromkeys(linears, Candidate("fp4", 32, False)), dict(linears)
    if with_experts:
        stacks = stacks_of(theirs)
        chosen |= dict.fromkeys(stacks, Candidate("int3", 64, True))
        numel |= {path: stack.numel() for path, stack in stacks.items()}
    plan = Plan("mixtral", chosen, 0.0, 5.0, numel)
    out = quantize_folder(folder, tmp_path / "small", plan=plan, progress=False)
    asked = {"codebook": "nf4", "block_size": 64}
    for model in (loaded(folder, plan=plan, **asked), loaded(out, **asked)):
        kinds = {module.weight.codebook for module in packed_stacks(model).values()}
        assert (
            kinds == {"int3" if with_experts else "nf4"}
            and model.get_submodule(next(iter(linears))).weight.codebook == "fp4"
        )
    ours = add_lora(loaded(out, **asked), r=2)
    ql.merge(ours, tmp_path / "merged", "requantised", source=out, anyway=True, progress=False)
    merged = loaded(tmp_path / "merged", **asked)
    for path, module in packed_stacks(loaded(out, **asked)).items():
        assert torch.equal(merged.get_submodule(path).weight.packed, module.weight.packed)


def test_a_damaged_stack_is_named(tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file

    folder, _ = saved("Mixtral", tmp_path, tokenizer)
    out = quantize_folder(folder, tmp_path / "small", "nf4", 16, progress=False)
    file = next(out.glob("*.safetensors"))
    tensors = load_file(file)
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} has 255 entries, but shape"):
        loaded(out)


def test_experts_of_unequal_shape_are_refused(tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file

    folder, _ = saved("Mixtral", tmp_path, tokenizer)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if ".experts.1." in name)
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match="cannot be put together as transformers does it: stack expects each tensor"):
        loaded(folder)


@pytest.mark.long
def test_state_dict_copies_and_moves(tmp_path, tokenizer):
    folder, _ = saved("GptOss", tmp_path, tokenizer)
    ours = loaded(folder)
    want = ours(IDS).logits
    for again in (deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(again(IDS).logits, want)
    other = loaded(folder, block_size=32)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(IDS).logits, want)
    keys = {key for key in ours.state_dict() if ".experts.down_proj" in key and ".layers.0." in key}
    assert "model.layers.0.mlp.experts.down_proj.stack_state" in keys and len(keys) == 8  # parts, and the bias
    ours.bfloat16()
    stack = next(iter(packed_stacks(ours).values())).weight
    assert torch.equal(dequantize(stack[0], torch.float32), dequantize(loaded_stack(folder)[0], torch.float32))
    assert ours.to("meta") and next(iter(packed_stacks(ours).values())).weight.device.type == "meta"


def loaded_stack(folder):
    return next(iter(packed_stacks(loaded(folder)).values())).weight


@pytest.mark.slow  # four passes through the model for each target
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Llama4Text"])
def test_merges_keep_the_experts(tmp_path, tokenizer, name, target):
    folder, theirs = saved(name, tmp_path, tokenizer)
    ours = add_lora(loaded(folder), r=4)
    for layer in adapters(ours).values():
        layer.lora_B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    ql.merge(ours, tmp_path / "merged", target, source=folder, anyway=True, progress=False)
    merged = loaded(tmp_path / "merged", **({} if target == "requantised" else {"codebook": None}))
    for path, module in packed_stacks(ours).items():
        if target == "requantised":
            assert torch.equal(merged.get_submodule(path).weight.packed, module.weight.packed)
            continue
        want = theirs.get_parameter(path) if target == "original" else dequantize_stack(module.weight, torch.float32)
        want = want.transpose(1, 2) if module.turned and target != "original" else want
        assert torch.equal(merged.get_parameter(path), want.bfloat16().float())
    assert not any(isinstance(m, Linear4bit) for m in merged.modules()) or target == "requantised"
