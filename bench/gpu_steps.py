"""Compare QLoRA steps of a seeded LLaMA on a device with those on a CPU.

    python bench/gpu_steps.py     compute the CPU's losses again: gpu_day_cpu.json, a few minutes

In: a device. Out: the losses of 20 steps in float32 and in bf16, and their distance from the CPU's stored losses.
The model has SmolLM2-135M's shape. Its weights are (k / 2^24 - 1/2) / 16 for a whole number k from a CPU's generator,
so they are uniform within 1/32 of 0. Every operation is exact, so each machine has the same bits, which a digest
confirms. A GPU's generator gives other numbers for the same seed, and randn's logarithms differ between vector paths.
The data are 4 rows of 128 ids, drawn from 64 ids that the seed chose; every step has the same rows. The loss can fall
from ln 49,152 = 10.8 to ln 64 = 4.2 by learning which ids occur, and further by learning the rows.

The drawn weights and the packed codes are compared bit for bit; the first loss of every token, and the mean loss of
every step, within LIMITS.
"""

import datetime
import hashlib
import json
import sys
from math import inf
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.cpu import versions  # noqa: E402
from bench.files import write  # noqa: E402
from bench.gpu_card import synchronize  # noqa: E402
from bench.timing import cpu_name  # noqa: E402
from qlora_lab.adapters.lora import adapters, add_lora  # noqa: E402
from qlora_lab.kernels.product import Race, keep  # noqa: E402
from qlora_lab.model.linear4bit import Linear4bit, quantize_linears  # noqa: E402
from qlora_lab.model.modes import measuring  # noqa: E402
from qlora_lab.train.loss import accumulate  # noqa: E402

STORED = HERE / "gpu_day_cpu.json"
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
TOY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True,
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
R = 16
LR = 1e-3
CLIP = 0.3
IDS = 64
# The CPU's product, whichever one wins the race there: float32 in float32 and bf16 in bf16, as on a GPU.
RACES = {"float32": Race(1.0, inf, inf), "bfloat16": Race(inf, inf, 1.0)}
# Where they come from: bench/README.md.
LIMITS = {"float32": {"tokens": 1e-3, "losses": 2.0**-14}, "bfloat16": {"tokens": 0.05, "losses": 2.0**-10}}


class Case(NamedTuple):
    """The shapes of model and batch, and the number of steps."""

    shape: dict
    rows: int
    length: int
    steps: int


CASES = {"smollm2-135m": Case(SMOLLM2, 4, 128, 20), "toy": Case(TOY, 2, 16, 6)}


def draw(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Uniform within 1/32 of 0, float32. Exact, because torch.rand gives multiples of 2^-24."""
    return (torch.rand(shape, generator=generator) - 0.5) / 16


def build(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[torch.nn.Module, dict[str, str]]:
    """The adapted model on `device`, and digests of the drawn weights and of their codes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(0)
    drawn = hashlib.sha256()
    packed = hashlib.sha256()
    model = LlamaForCausalLM(LlamaConfig(**case.shape, attn_implementation="sdpa"))
    for p in model.parameters():
        if p.dim() == 2:
            p.data = draw(p.shape, generator)
            drawn.update(p.data.numpy())
    quantize_linears(model.to(device))
    for module in model.modules():
        if isinstance(module, Linear4bit):
            packed.update(module.weight.packed.cpu().numpy())
    for p in model.parameters():  # not the model: its rotary frequencies stay float32
        p.data = p.data.to(dtype)
    add_lora(model, R)
    for layer in adapters(model).values():
        layer.lora_A.data = draw(layer.lora_A.shape, generator).to(device)
    return model.train(), {"weights": drawn.hexdigest(), "codes": packed.hexdigest()}


def batch_of(case: Case) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(case.shape["vocab_size"], (IDS,), generator=generator)
    ids = chosen[torch.randint(IDS, (case.rows, case.length), generator=generator)]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def first_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor], device: torch.device) -> list[float]:
    """Loss of every token in nats, before training."""
    ids = batch["input_ids"].to(device)
    with measuring(model):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").tolist()


def train(case: Case, dtype: torch.dtype, device: torch.device, end: float = inf) -> dict:
    """The first loss of every token, the mean loss, gradient norm and seconds of every step, and digests.

    After `end` of perf_counter no step is begun but the first.
    """
    model, digests = build(case, dtype, device)
    batch = batch_of(case)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    record = digests | {"tokens": first_losses(model, batch, device), "losses": [], "norms": [], "seconds": []}
    for _ in range(case.steps):
        if record["losses"] and perf_counter() > end:
            break
        start = perf_counter()
        optimizer.zero_grad(set_to_none=True)
        record["losses"].append(accumulate(model, [batch], case.rows * (case.length - 1)))
        record["norms"].append(torch.nn.utils.clip_grad_norm_(parameters, CLIP).item())
        optimizer.step()
        synchronize(device)
        record["seconds"].append(perf_counter() - start)
    return record


def apart(run: dict, cpu: dict) -> dict[str, float]:
    """How far two runs are: of the first losses, root mean square over their spread; of the mean losses, the largest
    difference over the loss."""
    tokens, losses = (torch.tensor(run[what], dtype=torch.float64) for what in ("tokens", "losses"))
    cpu_tokens, cpu_losses = (torch.tensor(cpu[what], dtype=torch.float64) for what in ("tokens", "losses"))
    cpu_losses = cpu_losses[: len(losses)]  # time may have ended the steps early
    return {
        "tokens": ((tokens - cpu_tokens).square().mean().sqrt() / cpu_tokens.std()).item(),
        "losses": ((losses - cpu_losses).abs() / cpu_losses).max().item(),  # NaN if any is NaN
    }


def compare(run: dict, cpu: dict, dtype: str) -> list[str]:
    """Put the distance from the CPU's run into `run`. Returns a sentence for each bound that it exceeds."""
    run |= {"cpu": cpu["losses"], "apart": apart(run, cpu), "limits": LIMITS[dtype]}
    failures = [f"{dtype}: other {what} than the CPU's" for what in ("weights", "codes") if run[what] != cpu[what]]
    for what, limit in LIMITS[dtype].items():
        if not run["apart"][what] <= limit:
            failures.append(f"{dtype}: {what} are {run['apart'][what]:.3g} from the CPU's, at most {limit:.3g}")
    return failures


def part(device: torch.device, quick: bool, end: float, results: dict) -> list[str]:
    """Fill `results`. Returns a sentence for each failure."""
    name = "toy" if quick else "smollm2-135m"
    stored = json.loads(STORED.read_text("utf-8"))
    failures = []
    results |= {"case": name, **CASES[name]._asdict(), "r": R, "lr": LR, "clip": CLIP, "cpu": stored["processor"]}
    for dtype in DTYPES:
        results[dtype] = train(CASES[name], DTYPES[dtype], device, end)
        failures += compare(results[dtype], stored["cases"][name][dtype], dtype)
    return failures


def main() -> None:
    """Compute the CPU's losses and store them."""
    cases = {}
    for name, case in CASES.items():
        cases[name] = {}
        for dtype, race in RACES.items():
            print(name, dtype, flush=True)
            keep(race)
            run = train(case, DTYPES[dtype], torch.device("cpu"))
            run["tokens"] = [round(loss, 6) for loss in run["tokens"]]
            cases[name][dtype] = {key: value for key, value in run.items() if key != "seconds"}
    facts = {"date": datetime.date.today().isoformat(), "processor": cpu_name(), "versions": versions()}
    write(STORED, json.dumps(facts | {"cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
