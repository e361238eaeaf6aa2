"""Our models in other libraries: what they count, move, copy and generate (docs/tools.md lists them)."""

import gc
import pickle
import weakref
from copy import deepcopy

import accelerate
import peft
import pytest
import torch
from accelerate.utils import compute_module_sizes
from torch import nn

from qlora_lab.adapters.lora import add_lora
from qlora_lab.adapters.peft_format import load_adapter
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.model.load import load
from qlora_lab.model.parameter_count import ParameterCount
from qlora_lab.quant.quantize import quantize

IDS = torch.arange(3, 30)[None]


@pytest.fixture
def loaded(folder):
    return load(folder, block_size=32, dtype=torch.float32, device="cpu", progress=False)[0]


def packed_layers(model) -> dict[str, Linear4bit]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, Linear4bit)}


# -------------------------------------------------------------------------------------------------------------- counts


def test_parameters_are_counted_as_weights(loaded, tiny_llama):
    assert loaded.num_parameters() == tiny_llama.num_parameters()
    assert loaded.num_parameters(exclude_embeddings=True) == tiny_llama.num_parameters(exclude_embeddings=True)
    assert loaded.num_parameters(only_trainable=True) == 0


def test_bytes_are_counted_once(loaded):
    others = sum(tensor.nbytes for tensor in loaded.parameters()) + loaded.model.rotary_emb.inv_freq.nbytes
    others += loaded.model.rotary_emb.original_inv_freq.nbytes
    wanted = others + sum(layer.weight.nbytes for layer in packed_layers(loaded).values())
    assert loaded.get_memory_footprint() == compute_module_sizes(loaded)[""] == wanted
    path, layer = next(iter(packed_layers(loaded).items()))
    assert compute_module_sizes(loaded)[path] == layer.weight.nbytes


def test_accelerate_plans_with_the_packed_bytes(loaded):
    sizes = compute_module_sizes(loaded)
    embeddings, layer = sizes["model.embed_tokens"], sizes["model.layers.0"]
    limits = {"cpu": 2 * embeddings + 3 * layer // 2, "disk": 10**9}  # as much again as the largest module is kept free
    plan = accelerate.infer_auto_device_map(loaded, limits, no_split_module_classes=["LlamaDecoderLayer"])
    assert plan["model.layers.0"] == "cpu" and plan["model.layers.1"] == "disk"


@torch.no_grad()
def test_a_weight_follows_its_buffers():
    """As accelerate, DataParallel and torch.export put other tensors there."""
    for double_quant in (False, True):
        layer, other = (Linear4bit(quantize(torch.randn(8, 64), double_quant=double_quant)) for _ in range(2))
        for name, tensor in other.named_buffers():
            layer._buffers[name] = tensor
        assert torch.equal(layer(torch.eye(64)), other(torch.eye(64)))
        assert layer.weight is layer.weight and layer.weight.packed is other.weight.packed
        assert set(layer.state_dict()) == set(other.state_dict()) and "packed" not in layer.state_dict()


@torch.no_grad()
def test_accelerate_offloads(loaded):
    before = loaded(IDS).logits
    moved = accelerate.cpu_offload(deepcopy(loaded), torch.device("cpu"), offload_buffers=True)
    assert moved.lm_head.weight.is_meta and torch.equal(moved(IDS).logits, before)


# -------------------------------------------------------------------------------------------------------------- copies


def test_copies_count_for_themselves(loaded):
    for copy in (deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        wanted = copy.num_parameters()
        assert isinstance(copy.num_parameters, ParameterCount) and wanted == loaded.num_parameters()
        copy.lm_head = nn.Linear(16, 1, bias=False)
        assert copy.num_parameters() == wanted + 16 - loaded.lm_head.weight.numel()
        assert all(layer.weight.packed is layer.packed for layer in packed_layers(copy).values())


def test_a_deleted_model_is_gone_at_once(loaded):
    copy = deepcopy(loaded)
    layer = weakref.ref(copy.model.layers[0])
    gc.disable()
    try:
        del copy
        assert layer() is None
    finally:
        gc.enable()


def test_loading_without_the_base_is_strict_only_if_asked():
    layer = Linear4bit(quantize(torch.ones(2, 64)), nn.Parameter(torch.zeros(2)))
    before = layer.weight
    assert layer.load_state_dict({"bias": torch.ones(2)}, strict=False).missing_keys == ["weight"]
    assert layer.bias.sum() == 2 and layer.weight is before
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        layer.load_state_dict({"bias": torch.ones(2)})


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.slow
def test_a_static_cache_gives_the_same_answer(loaded):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    answer = loaded.generate(IDS, **options)
    assert torch.equal(loaded.generate(IDS, **options, cache_implementation="static"), answer)


def config_of_peft(**settings):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    config._register_custom_module({Linear4bit: peft.tuners.lora.Linear})
    return config


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:Could not find a config file")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_peft_puts_its_adapters_on_our_layers(loaded, tmp_path):
    with torch.no_grad():
        before = loaded(IDS).logits
    made = peft.get_peft_model(deepcopy(loaded), config_of_peft())
    with torch.no_grad():
        assert torch.equal(made(IDS).logits, before)
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and all(p.dtype == torch.float32 for p in trained.values())
    g = torch.Generator().manual_seed(0)
    for name, p in trained.items():
        if "lora_B" in name:
            p.data.normal_(0, 0.1, generator=g)
    made(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in trained.values())
    made.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = made.eval()(IDS).logits
        assert (wanted - before).abs().max() > 0.1
        again = peft.PeftModel.from_pretrained(deepcopy(loaded), tmp_path / "adapter", config=config_of_peft())
        assert torch.equal(again(IDS).logits, wanted)
        ours = load_adapter(loaded, tmp_path / "adapter")
        torch.testing.assert_close(ours(IDS).logits, wanted, rtol=1e-4, atol=1e-4)  # float32 sums in another order


def test_peft_refuses_our_layers_by_name_without_the_mapping(loaded):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"Target module Linear4bit\(.*\) is not supported"):
        peft.get_peft_model(loaded, config)


# ------------------------------------------------------------------------------------------------ transformers' Trainer


@pytest.mark.slow  # imports and runs Trainer
@pytest.mark.filterwarnings("ignore")  # its own
def test_a_trainers_checkpoint_is_read_by_load_adapter_and_not_by_trainer(loaded, folder, tmp_path):
    """docs/tools.md says so; if Trainer reads it one day, the page has to say that."""
    adapted = add_lora(loaded, r=2)
    trainer = _trainer(adapted, tmp_path, max_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    again, _ = load(folder, block_size=32, dtype=torch.float32, device="cpu", progress=False)
    load_adapter(again, checkpoint)
    assert torch.equal(again(IDS).logits, adapted(IDS).logits)
    with pytest.raises(ValueError, match="Can't find a checkpoint index"):
        _trainer(adapted, tmp_path, max_steps=4).train(resume_from_checkpoint=str(checkpoint))
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin"):
        _trainer(adapted, tmp_path, max_steps=2, **best).train()


def _trainer(model, out, **options):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    common = {"save_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    return Trainer(model, TrainingArguments(str(out), **common | options), train_dataset=data, eval_dataset=data)
