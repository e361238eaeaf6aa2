"""Compare greedy answers of SmolLM2-135M in NF4 with transformers' on the dequantised model in float32.

    python bench/decode_equal.py        50 prompts of 64 new tokens; writes decode_equal.json; a few minutes

Two float32 sums of the same numbers in another order differ in their last bits. Where two logits lie closer than that,
either token is right, and from there on the answers are of different texts. Such a place is listed with its gap: the
logit of transformers' token minus that of ours, both from transformers. A gap wider than TIE is a mistake, and the
command fails.
"""

import argparse
import json
import math
import sys
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

import qlora_lab as ql  # noqa: E402
from bench.files import write  # noqa: E402
from bench.timing import cpu_name  # noqa: E402
from qlora_lab.infer.cache import make_cache  # noqa: E402
from qlora_lab.infer.fast import can_step, step_of  # noqa: E402
from qlora_lab.infer.stack import read_stack  # noqa: E402
from qlora_lab.measure.perplexity import text_windows, topics_text  # noqa: E402
from qlora_lab.model.linear4bit import Linear4bit  # noqa: E402
from qlora_lab.quant.quantize import dequantize  # noqa: E402

MODEL = "smollm2-135m"
TIE = 1e-3  # logits reach 30, and in float32 two orders of the sums differ by some 1e-5
LENGTH = 256  # tokens of a window of the perplexity
THINGS = ("rain", "iron", "bread", "music", "Paris", "prime numbers", "horses", "glass", "sleep", "trade")
BEGINNINGS = ("The history of {} begins", "Three facts about {}:\n1.", "Question: What is {}?\nAnswer:")
BEGINNINGS += ("Dear Anna, I write to you about {}", "# A Python function about {}\ndef")
PROMPTS = [beginning.format(thing) for thing in THINGS for beginning in BEGINNINGS]


def dequantised(model: nn.Module) -> nn.Module:
    """Replace the packed layers with plain ones, in place, and widen the rest to float32."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dequantize(module.weight, torch.float32)
            plain = nn.Linear(*weight.shape[::-1], bias=module.bias is not None, device="meta")
            plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), module.bias
            model.set_submodule(path, plain)
    return model.float().eval()


@torch.no_grad()
def theirs(twin: nn.Module, ids: list[int], new: int) -> list[int]:
    """The greedy continuation by transformers, without the token that ends it."""
    from transformers import GenerationConfig

    ends = twin.generation_config.eos_token_id
    how = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0, eos_token_id=ends)
    rows = twin.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), generation_config=how)
    found = rows[0, len(ids) :].tolist()
    return found[:-1] if found[-1:] == [ends] else found


@torch.no_grad()
def difference(twin: nn.Module, ids: list[int], ours: list[int], expected: list[int], end: int) -> dict | None:
    """The first place at which the answers part, with the gap between the two logits; None for equal answers."""
    mine, other = [*ours, end], [*expected, end]  # an answer may also end where the other goes on
    place = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
    if place is None:
        return None
    logits = twin(torch.tensor([ids + expected[:place]])).logits[0, -1]
    gap = (logits[other[place]] - logits[mine[place]]).item()
    return {"token": place, "ours": mine[place], "theirs": other[place], "gap": gap}


@torch.no_grad()
def stepped_perplexity(model: nn.Module, rows: torch.Tensor) -> float:
    """Perplexity of windows (windows, length) int64 where every token passes the decode path by itself."""
    stack = read_stack(model)
    step, only = step_of(stack), torch.tensor([0])
    losses = []
    for row in tqdm(rows, desc="perplexity", leave=False):
        cache = make_cache(stack, 1, len(row))
        logits = torch.cat([step(row[i : i + 1], cache, only) for i in range(len(row) - 1)])  # (length - 1, vocabulary)
        losses.append(nn.functional.cross_entropy(logits, row[1:]).item())
    return math.exp(sum(losses) / len(losses))


def compare(prompts: list[str], new: int, windows: int = 4) -> dict:
    """Return what is equal, where answers differ, and both perplexities."""
    # the head stays in bf16, as in most models; on both sides, what is computed with it is float32
    model, tokenizer = ql.load(MODEL, dtype=torch.bfloat16, progress=False)
    kernel = can_step(read_stack(model))
    text = topics_text()  # of this Python: other versions have other perplexities, but the same difference
    rows = text_windows(tokenizer, text, LENGTH, windows)
    found = {"ours": stepped_perplexity(model, rows)}
    # one after the other: a user's single answer takes another kernel than eight at once
    answers = [ql.decode(model, tokenizer, prompt, new, progress=False)[0] for prompt in tqdm(prompts, leave=False)]
    twin, parted, equal = dequantised(model), [], 0
    found["library"] = ql.perplexity(twin, tokenizer, text, LENGTH, windows, progress=False)
    found["relative"] = abs(found["ours"] / found["library"] - 1)
    for prompt, answer in zip(tqdm(prompts, leave=False), answers, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        expected = theirs(twin, ids, new)
        where = difference(twin, ids, answer.ids, expected, twin.generation_config.eos_token_id)
        equal += where["token"] if where else len(expected)
        parted += [{"prompt": prompt, **where}] if where else []
    sizes = {"prompts": len(prompts), "new": new, "tokens": sum(len(answer.ids) for answer in answers)}
    return {"model": MODEL, "kernel": kernel, **sizes, "equal tokens": equal, "parted": parted, "perplexity": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"at most {len(PROMPTS)}")
    parser.add_argument("--new", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--out", type=Path, default=HERE / "decode_equal.json")
    a = parser.parse_args()
    facts = {"date": date.today().isoformat(), "processor": cpu_name(), "torch": torch.__version__}
    result = facts | compare(PROMPTS[: a.prompts], a.new)
    write(a.out, json.dumps(result, indent=1) + "\n")
    print(f"{len(result['parted'])} of {result['prompts']} answers part from transformers'")
    for row in result["parted"]:
        print(f"  {row['prompt']!r}, token {row['token']}: logits {row['gap']:.1e} apart")
    print("perplexity:", result["perplexity"])
    if any(abs(row["gap"]) > TIE for row in result["parted"]) or result["perplexity"]["relative"] > 1e-4:
        raise SystemExit("this is more than rounding")


if __name__ == "__main__":
    main()
