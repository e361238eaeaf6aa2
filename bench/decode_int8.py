"""Measure what SmolLM2-135M in NF4 loses when it computes in int8 instead of float32 (qlora_lab/infer/int8.py).

    python bench/decode_int8.py         writes decode_int8.json; a few minutes

Windows of text pass all layers in float32, in int8 as a prompt is read, its attention by the prompt's kernel, and in
int8 token by token, as an answer is written. Compared are the perplexities, the logits at each place, and the tokens
that are likeliest there. Then 50 prompts of 128 tokens, and 50 of a few words, are answered greedily in float32 and in
int8.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

import qlora_lab as ql  # noqa: E402
from bench.decode_equal import LENGTH, MODEL, PROMPTS  # noqa: E402
from bench.files import write  # noqa: E402
from bench.timing import cpu_name  # noqa: E402
from qlora_lab.infer import step as readable  # noqa: E402
from qlora_lab.infer.cache import make_cache  # noqa: E402
from qlora_lab.infer.fast import can_step, step_of  # noqa: E402
from qlora_lab.infer.int8 import with_int8  # noqa: E402
from qlora_lab.infer.prompt import attention_of  # noqa: E402
from qlora_lab.infer.stack import Stack, read_stack  # noqa: E402
from qlora_lab.infer.step import forward, multiply  # noqa: E402
from qlora_lab.kernels.byte_sums import has_bytes  # noqa: E402
from qlora_lab.measure.perplexity import text_windows, topics_text  # noqa: E402

WINDOWS = 32
PROMPT = 128  # tokens of a prompt that is answered
WAYS = "float32", "int8", "int8, token by token"  # of computing a text


def logits_of(stack: Stack, ids: torch.Tensor, how: str) -> torch.Tensor:
    """Logits (tokens, vocabulary) of ids (tokens,), which pass the layers as `how`, one of WAYS, says."""
    cache = make_cache(stack, 1, len(ids))
    with torch.no_grad():
        if how == "int8, token by token":
            step, only = step_of(stack, True), torch.tensor([0])
            return torch.cat([step(token[None], cache, only) for token in ids])
        if how == "float32":
            return multiply(forward(stack, ids, cache), stack.head)
        rest = with_int8(stack)
        first = forward(stack, ids[:1], cache)  # as read_prompt does
        attend = partial(by_kernel, attention_of(rest.layers[0], rest)) if can_step(rest) else readable.attend
        with patch.object(readable, "attend", attend):
            return multiply(torch.cat([first, forward(rest, ids[1:], cache)]), stack.head)


def by_kernel(attend: Callable, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """step.attend through the kernel of a prompt, which turns q: by angles of 0, because it has been turned."""
    tokens, total = q.shape[1], keys.shape[1]
    angles = torch.ones(keys.shape[1:]), torch.zeros(keys.shape[1:])  # cosines and sines, (total, head_dim)
    rows = q.transpose(0, 1).reshape(tokens, -1)  # (tokens, heads * head_dim)
    return attend(rows, len(q), angles, (keys.contiguous(), values.contiguous()), total - tokens)


def over_text(stack: Stack, rows: torch.Tensor) -> dict:
    """Compare all WAYS with the first on windows (windows, length) int64."""
    losses = {how: [] for how in WAYS}
    found = {how: {"divergence": [], "logits, relative": [], "same likeliest token": []} for how in WAYS[1:]}
    for row in tqdm(rows, desc="windows", leave=False):
        every = {how: logits_of(stack, row[:-1], how) for how in WAYS}  # (length - 1, vocabulary) each
        for how, logits in every.items():
            losses[how].append(torch.nn.functional.cross_entropy(logits, row[1:]).item())
        for how, values in found.items():
            for name, value in differences(every[WAYS[0]], every[how]).items():
                values[name].append(value)
    mean = {how: {name: sum(values) / len(values) for name, values in of.items()} for how, of in found.items()}
    perplexity = {how: math.exp(sum(values) / len(values)) for how, values in losses.items()}
    for how, of in mean.items():
        of["logits, relative"] = math.sqrt(of["logits, relative"])
        of["perplexity, relative"] = perplexity[how] / perplexity[WAYS[0]] - 1
    return {"windows": list(rows.shape), "perplexity": perplexity} | mean


def differences(exact: torch.Tensor, rounded: torch.Tensor) -> dict[str, float]:
    """Compare logits (tokens, vocabulary): their distributions, the logits themselves, and their largest."""
    first, second = exact.log_softmax(-1), rounded.log_softmax(-1)
    # a constant that is added to all logits of a place changes nothing: compare what is around their mean
    centred = [logits - logits.mean(-1, keepdim=True) for logits in (exact, rounded)]
    return {
        "divergence": (first.exp() * (first - second)).sum(-1).mean().item(),  # Kullback-Leibler, nats a token
        # mean square of the difference over that of the logits: a root is taken at the end
        "logits, relative": ((centred[1] - centred[0]).pow(2).mean() / centred[0].pow(2).mean()).item(),
        "same likeliest token": (exact.argmax(-1) == rounded.argmax(-1)).double().mean().item(),
    }


def over_answers(model, tokenizer, prompts: list, new: int) -> dict:
    """Answer prompts both ways, one at a time; where two answers part."""
    parted = []
    for prompt in tqdm(prompts, desc="answers", leave=False):
        pair = [ql.decode(model, tokenizer, [prompt], new, ql.Sampling(int8=int8), progress=False)[0].ids
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
