"""Run a LLaMA of 7B parameters on a GPU: quantise it, take five QLoRA steps, answer; compare memory with the ledger.

In: a device. Out: seconds and tokens per second, bytes measured and predicted, seconds per token of an answer; the same
with bitsandbytes' layers, if it is installed. Weights are random and made on the device, layer by layer: each layer is
in 4 bits before the next is drawn. Of 512 tokens the last 64 are learned; steps use gradient checkpointing.

Not here: the same on a CPU, from files (seven_b.py).
"""

import gc
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from time import perf_counter

import torch
from torch import nn

from bench.gpu import bnb_linear
from bench.gpu_card import synchronize
from bench.gpu_check import first_line
from bench.render import PEER
from bench.seven_b import SHAPE, TOY
from qlora_lab.adapters.lora import add_lora
from qlora_lab.data.dataset import IGNORED
from qlora_lab.doctor.free_memory import free_memory
from qlora_lab.memory.ledger import Ledger
from qlora_lab.memory.predict import predict_memory
from qlora_lab.model.linear4bit import quantize_linears
from qlora_lab.model.modes import checkpointing, measuring
from qlora_lab.train.loss import accumulate

R = 64
TOKENS = 512
LABELS = 64
STEPS = 5
ANSWER = 32
TOY_R = 4
TOY_TOKENS = 16
TOY_LABELS = 8
TOY_ANSWER = 3
NO_CUDA = "not measured: only CUDA's allocator counts its bytes"


def bnb_linears(layer: nn.Module) -> nn.Module:
    """Like quantize_linears, with the layers of bitsandbytes."""
    for name, module in list(layer.named_modules()):
        if type(module) is nn.Linear:
            layer.set_submodule(name, bnb_linear(module))
    return layer


def build(shape: dict, device: torch.device, quantise: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A frozen bf16 model on `device` whose layers went through `quantise` one by one."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(**shape | {"num_hidden_layers": 0}, tie_word_embeddings=False, attn_implementation="sdpa")
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for number in range(shape["num_hidden_layers"]):
            layer = LlamaDecoderLayer(model.config, number).bfloat16()
            model.model.layers.append(quantise(layer.requires_grad_(False)))
    model.config.num_hidden_layers = shape["num_hidden_layers"]
    return model.requires_grad_(False).eval()


def ledger(shape: dict, quick: bool) -> Ledger:
    """The memory ledger's prediction for these steps on a GPU."""
    r, tokens, labels = (TOY_R, TOY_TOKENS, TOY_LABELS) if quick else (R, TOKENS, LABELS)
    return predict_memory(
        {"model_type": "llama", **shape}, r=r, batch_size=1, length=tokens, learned=labels / tokens,
        gradient_checkpointing=True, device="cuda",
    )  # fmt: skip


def predicted(prediction: Ledger) -> dict:
    """Predicted bytes; `allocated` is the part of torch's allocator, without CUDA's own."""
    allocated = prediction.peak - prediction.group("runtime")
    return {"peak": prediction.peak, "allocated": allocated, "phase": prediction.phase, "groups": prediction.groups}


def train(model: nn.Module, device: torch.device, quick: bool, end: float) -> dict:
    """Make five steps, of which the first compiles; at least two, even if time is short."""
    r, tokens, labels = (TOY_R, TOY_TOKENS, TOY_LABELS) if quick else (R, TOKENS, LABELS)
    add_lora(model, r)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    learned = ids.clone()
    learned[:, :-labels] = IGNORED
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": learned}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
    facts = {"r": r, "tokens": tokens, "learned_tokens": labels, "losses": [], "seconds": []}
    model.train()
    for number in range(STEPS):
        if number > 1 and perf_counter() > end:
            break
        start = perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with checkpointing(model):
            facts["losses"].append(accumulate(model, [batch], labels))
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        synchronize(device)
        facts["seconds"].append(perf_counter() - start)
    return facts | {"tokens_per_second": tokens / statistics.median(facts["seconds"][1:])}


def answer(model: nn.Module, device: torch.device, quick: bool) -> dict:
    """Time greedy tokens after a prompt of 32; answers of different lengths separate the prompt's time."""
    from transformers import GenerationConfig

    most = TOY_ANSWER if quick else ANSWER
    prompt = torch.randint(model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(1)).to(device)

    def seconds(tokens: int) -> float:
        options = {"do_sample": False, "num_beams": 1, "min_new_tokens": tokens, "max_new_tokens": tokens}
        start = perf_counter()
        config = GenerationConfig(**options, pad_token_id=0)
        made = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        synchronize(device)
        if made.shape[1] != prompt.shape[1] + tokens:
            raise ValueError(f"{made.shape[1] - prompt.shape[1]} tokens were made, {tokens} were asked for")
        return perf_counter() - start

    with measuring(model):
        seconds(2)  # compiles
        first, whole = seconds(1), seconds(most + 1)
    return {"tokens": most, "seconds_a_token": (whole - first) / most, "seconds_of_the_first": first}


def measure(quantise: Callable, shape: dict, device: torch.device, quick: bool, end: float) -> dict:
    """Load, train and answer."""
    start = perf_counter()
    _reset(device)
    model = build(shape, device, quantise)
    synchronize(device)
    facts = {"load": {"seconds": perf_counter() - start, "bytes": _bytes(device)}}
    _reset(device)
    facts["steps"] = train(model, device, quick, end)
    facts["steps"]["bytes"] = _bytes(device)
    return facts | {"answer": answer(model, device, quick)}


def _reset(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _bytes(device: torch.device) -> dict | str:
    """Of torch's allocator, since _reset; `outside` it is CUDA's context, and whatever else is on the card."""
    if device.type != "cuda":
        return NO_CUDA
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "most_allocated": torch.cuda.max_memory_allocated(device),
        "most_reserved": torch.cuda.max_memory_reserved(device),
        "outside": total - free - torch.cuda.memory_reserved(device),
    }


def part(device: torch.device, quick: bool, end: float, results: dict) -> list[str]:
    """Fill `results`. Returns a sentence for each failure."""
    shape = TOY if quick else SHAPE
    prediction = ledger(shape, quick)
    free = free_memory(device)
    results |= {"shape": shape, "predicted": predicted(prediction), "free_bytes": free}
    if device.type == "cuda" and free < prediction.peak:
        return [f"the ledger predicts {prediction.peak} bytes, but the card has {free} free: nothing was run"]
    results["ours"] = measure(quantize_linears, shape, device, quick, end)
    if device.type == "cuda":
        most = results["ours"]["steps"]["bytes"]["most_allocated"]
        results["allocated_over_predicted"] = most / results["predicted"]["allocated"]
    results[PEER] = {"error": "not installed"}
    if find_spec(PEER):
        try:
            results[PEER] = measure(bnb_linears, shape, device, quick, end)
        except Exception as error:  # it may raise anything for an input that it does not accept
            results[PEER] = {"error": first_line(error)}
    losses = results["ours"]["steps"]["losses"]
    return [] if torch.tensor(losses).isfinite().all() else [f"a loss is not finite: {losses}"]
