"""Full fine-tuning: all weights learn, by float32 copies; a resume gives the same bytes; 4-bit weights are refused."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file

from qlora_lab.adapters.adapter import learned, remove_adapter
from qlora_lab.adapters.add_adapter import add_adapter
from qlora_lab.adapters.peft_format import load_adapter, save_adapter
from qlora_lab.data.dataset import collate, encode_all
from qlora_lab.data.examples import Example
from qlora_lab.doctor.diagnose import diagnose
from qlora_lab.doctor.dtype_policy import dtype_policy
from qlora_lab.model.linear4bit import quantize_linears
from qlora_lab.train.loss import accumulate
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training, finetune

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(3, 30)[None]
EXAMPLES = [Example((("user", f"{i} and {i}"), ("assistant", "two" if i % 2 else "too"))) for i in range(12)]


def train(model, tokenizer, folder, **options):
    options = {"data": EXAMPLES, "steps": 6, "batch_size": 4, "lr": 1e-3, "progress": False, **options}
    return finetune(model, tokenizer, out=folder, **options)


def test_every_weight_learns_and_a_tied_head_once(tiny_llama):
    tiny_llama.lm_head.weight = tiny_llama.model.embed_tokens.weight
    model = add_adapter(tiny_llama, "full")
    assert list(learned(model)) == [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in learned(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.long
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_resumed_run_gives_the_same_bytes(tmp_path, tiny_llama, tokenizer, dtype, bits):
    def model():
        return add_adapter(deepcopy(tiny_llama).to(dtype), "full")

    how = {"save_every": 3, "optimizer_bits": bits}
    whole = train(model(), tokenizer, tmp_path / "whole", **how)
    stopped = Training(model(), tokenizer, EXAMPLES, tmp_path / "cut", whole.settings, progress=False)
    for line in stopped:
        if line["step"] == 3:
            stopped.stop()
    resumed = train(model(), tokenizer, tmp_path / "cut", resume=True, **how)
    assert resumed.losses == whole.losses
    first, second = ((run.adapter / "adapter_model.safetensors").read_bytes() for run in (whole, resumed))
    assert first == second
    assert whole.losses[-1] < whole.losses[0]


def test_bf16_weights_are_their_copies_rounded(tmp_path, tiny_llama, tokenizer):
    model = add_adapter(tiny_llama.bfloat16(), "full")
    train(model, tokenizer, tmp_path / "run", steps=4, save_every=3, lr=1e-5)
    stored = load_file(tmp_path / "run/checkpoints/step-00000003/state.safetensors")
    for number, name in enumerate(learned(model)):
        master = stored[f"optimizer.{number}.master"]
        (weight,) = (
            tensor for key, tensor in stored.items() if key.endswith(f".{name}") and key.startswith("adapter.")
        )
        assert torch.equal(weight, master.bfloat16()) and not torch.equal(master, weight.float())


def test_it_goes_through_its_folder(tmp_path, tiny_llama):
    fresh = deepcopy(tiny_llama)
    model = add_adapter(tiny_llama, "full")
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01
        want = model(IDS).logits
        folder = save_adapter(model, tmp_path / "adapter")
        assert torch.equal(load_adapter(fresh, folder)(IDS).logits, want)


@pytest.mark.long
def test_a_part_learns_beside_packed_layers_and_goes_through_its_folder(tmp_path, tiny_llama, tokenizer):
    fresh = quantize_linears(tiny_llama)
    model = add_adapter(deepcopy(fresh), "full", parts="embed_tokens")
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    assert list(learned(model)) == list(learned(deepcopy(model))) == ["model.embed_tokens.weight"]
    run = train(model, tokenizer, tmp_path / "run")
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == {"model.embed_tokens.weight"}
    again = load_adapter(fresh, run.adapter)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert [name for name, p in again.named_parameters() if p.requires_grad] == ["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match="embed_tokens of this model learned, so there is no base"):
        remove_adapter(again)


def test_parts_that_are_none_are_told(tmp_path, tiny_llama):
    with pytest.raises(ValueError, match="is called 'projector': choose from embed_tokens, layers, norm"):
        add_adapter(tiny_llama, "full", parts=["norm", "projector"])
    with pytest.raises(ValueError, match="parts names no module, so nothing would learn"):
        add_adapter(tiny_llama, "full", parts=[])
    with pytest.raises(TypeError, match="parts is 3, but it must be a name or a list of names"):
        add_adapter(tiny_llama, "full", parts=3)
    with pytest.raises(ValueError, match="packed in 4: load it with codebook=None"):
        add_adapter(quantize_linears(tiny_llama), "full", parts="layers")
    folder = save_adapter(add_adapter(tiny_llama, "full", parts="norm"), tmp_path / "norm")
    other = deepcopy(tiny_llama)
    with pytest.raises(ValueError, match="has parts="):
        load_adapter(add_adapter(remake(other), "full", parts="embed_tokens"), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"parts": 3}))
    with pytest.raises(ValueError, match="has parts=3: it must be a list of names of modules"):
        load_adapter(remake(other), folder)


def remake(model):
    """The model without the mark of what learns in it."""
    del model.full_tuning
    return model.requires_grad_(False)


def test_packed_weights_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="packed in 4: load it with codebook=None"):
        add_adapter(quantize_linears(tiny_llama), "full")


def test_a_deep_copy_learns_its_own_weights(tiny_llama):
    model = add_adapter(tiny_llama, "full")
    other = deepcopy(model)
    assert {id(p) for p in learned(other).values()} == {id(p) for p in other.parameters()}


def test_the_doctor_knows_that_everything_learns(tiny_llama, tokenizer):
    model = add_adapter(tiny_llama, "full")
    report = diagnose(model, tokenizer, EXAMPLES, Settings(batch_size=2), progress=False)
    assert report.ok, str(report)
    policy = dtype_policy(model)
    assert policy.trained == policy.weights - sum(b.numel() for b in model.buffers())
    assert not any("outside the adapters" in finding.message for finding in report.findings)


def test_the_doctor_counts_the_copies(tiny_llama):
    model = add_adapter(tiny_llama.bfloat16(), "full")
    weights = sum(p.numel() for p in model.parameters())
    rows = {(row.what, row.dtype): row.nbytes for row in dtype_policy(model).rows}
    assert rows["master copies", "float32"] == 4 * weights and rows["gradients", "bfloat16"] == 2 * weights
    assert rows["moments", "float32"] == 8 * weights
    assert not any(what == "other trained weights" for what, _ in rows)


def gradients(model, batches, tokens):
    model.zero_grad()
    accumulate(model, batches, tokens)
    return {name: p.grad.double() for name, p in learned(model).items()}


@pytest.mark.long
def test_bf16_gradients_of_many_batches_are_rounded_twice(tiny_llama, tokenizer):
    """Sums of all but the last, and of all: each is rounded by at most 2^-8 of it; 1 % are for float32's own."""
    model = add_adapter(tiny_llama.bfloat16(), "full")
    encoded, _ = encode_all(EXAMPLES, tokenizer, 256, progress=False)
    batches = [collate([example], 0) for example in encoded]
    tokens = sum(example.answer_tokens for example in encoded)
    single = [gradients(model, [batch], tokens) for batch in batches]
    got = gradients(model, batches, tokens)
    worse = 0
    for name, gradient in got.items():
        parts = torch.stack([part[name] for part in single])
        bound = 1.01 * 2**-8 * (parts[:-1].sum(0).abs() + parts.sum(0).abs()) + 1e-30
        assert ((gradient - parts.sum(0)).abs() <= bound).all(), name
        in_16_bits = parts[0]
        for part in parts[1:]:
            in_16_bits = (in_16_bits + part).bfloat16().double()
        worse += ((in_16_bits - parts.sum(0)).abs() > bound).sum().item()
    assert worse > 0  # as torch adds them, some are further off


def test_nothing_is_left_to_shard(tmp_path, tiny_llama, tokenizer):
    with pytest.raises(ValueError, match="method full freezes none"):
        train(add_adapter(tiny_llama, "full"), tokenizer, tmp_path / "run", shard=True)


def test_float16_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="needs weights in bf16 or float32, but .* is torch.float16"):
        add_adapter(tiny_llama.half(), "full")
