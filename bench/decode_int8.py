"""Measure what SmolLM2-135M in NF4 loses when text is read in int8 instead of float32 (qlora_lab/infer/int8.py).

    python bench/decode_int8.py         writes decode_int8.json; a few minutes

Windows of text pass all layers, once in float32 and once in int8. Compared are the perplexities, the logits at each
place, and the tokens that are likeliest there. Then 50 prompts of 128 tokens are answered greedily both ways: their
tokens are float32 in both, but they see the keys and values of the prompt.
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
from tqdm.auto import tqdm  # noqa: E402

import qlora_lab as ql  # noqa: E402
from bench.decode_equal import LENGTH, MODEL, PROMPTS  # noqa: E402
from bench.files import write  # noqa: E402
from bench.timing import cpu_name  # noqa: E402
from qlora_lab.infer.cache import make_cache  # noqa: E402
from qlora_lab.infer.int8 import with_int8  # noqa: E402
from qlora_lab.infer.stack import Stack, read_stack  # noqa: E402
from qlora_lab.infer.step import forward, multiply  # noqa: E402
from qlora_lab.kernels.byte_sums import has_bytes  # noqa: E402
from qlora_lab.measure.perplexity import text_windows, topics_text  # noqa: E402

WINDOWS = 32
PROMPT = 128  # tokens of a prompt that is answered


@torch.no_grad()
def logits_of(stack: Stack, ids: torch.Tensor, in_int8: bool) -> torch.Tensor:
    """Logits (tokens, vocabulary) of ids (tokens,), which pass the layers as read_prompt passes them."""
    cache = make_cache(stack, 1, len(ids))
    parts = (stack, ids[:1]), (with_int8(stack) if in_int8 else stack, ids[1:])
    return multiply(torch.cat([forward(layers, some, cache) for layers, some in parts]), stack.head)


def over_text(stack: Stack, rows: torch.Tensor) -> dict:
    """Compare both on windows (windows, length) int64."""
    losses, divergences, shifts, same = {"float32": [], "int8": []}, [], [], []
    for row in tqdm(rows, desc="windows", leave=False):
        both = {name: logits_of(stack, row[:-1], name == "int8") for name in losses}  # (length - 1, vocabulary) each
        for name, logits in both.items():
            losses[name].append(torch.nn.functional.cross_entropy(logits, row[1:]).item())
        first, second = (logits.log_softmax(-1) for logits in both.values())
        divergences.append((first.exp() * (first - second)).sum(-1).mean().item())
        # a constant that is added to all logits of a place changes nothing: compare what is around their mean
        centred = [logits - logits.mean(-1, keepdim=True) for logits in both.values()]
        shifts.append(((centred[1] - centred[0]).pow(2).mean() / centred[0].pow(2).mean()).item())
        same.append((first.argmax(-1) == second.argmax(-1)).double().mean().item())
    mean = {name: sum(values) / len(values) for name, values in losses.items()}
    found = {name: math.exp(value) for name, value in mean.items()}
    return {
        "windows": list(rows.shape),
        "perplexity": found | {"relative": found["int8"] / found["float32"] - 1},
        "logits, relative": math.sqrt(sum(shifts) / len(shifts)),  # root mean square of the difference over the logits'
        "divergence": sum(divergences) / len(divergences),  # Kullback-Leibler, nats a token
        "same likeliest token": sum(same) / len(same),
    }


def over_answers(model, tokenizer, prompts: list, new: int) -> dict:
    """Answer prompts both ways, one at a time; where two answers part."""
    parted = []
    for prompt in tqdm(prompts, desc="answers", leave=False):
        pair = [ql.decode(model, tokenizer, [prompt], new, ql.Sampling(int8_prompt=int8), progress=False)[0].ids
                for int8 in (False, True)]  # fmt: skip
        if pair[0] != pair[1]:
            parted.append(
                next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), len(min(pair, key=len)))
            )
    return {"prompts": len(prompts), "new": new, "parted": len(parted), "first different token": sorted(parted)}


def compare(windows: int, prompts: int, new: int) -> dict:
    model, tokenizer = ql.load(MODEL, dtype=torch.bfloat16, progress=False)
    text = topics_text()  # of this Python: other versions have other perplexities, but much the same difference
    found = over_text(read_stack(model), text_windows(tokenizer, text, LENGTH, windows))
    long = text_windows(tokenizer, text, PROMPT, prompts).tolist()
    return {"model": MODEL, "instruction": has_bytes(), **found} | {
        f"answers after {PROMPT} tokens": over_answers(model, tokenizer, long, new),
        "answers after a few words": over_answers(model, tokenizer, PROMPTS[:prompts], new),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"of {LENGTH} tokens")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"at most {len(PROMPTS)}")
    parser.add_argument("--new", type=int, default=50, help="most tokens of an answer")
    parser.add_argument("--out", type=Path, default=HERE / "decode_int8.json")
    a = parser.parse_args()
    facts = {"date": date.today().isoformat(), "processor": cpu_name(), "torch": torch.__version__}
    result = facts | compare(a.windows, a.prompts, a.new)
    write(a.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
