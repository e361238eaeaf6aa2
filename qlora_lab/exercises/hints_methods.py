"""The hints for the exercises of notebook 11, in the form that hints.py describes."""

import torch
from torch.nn.functional import gelu, linear, relu

WITHOUT = {
    "my_houlsby": ("adapters.houlsby.HoulsbyLinear.forward",),
    "my_learned": ("memory.predict.predict_memory", "memory.learned.learned_by_method"),
}


def my_houlsby(y, down, down_bias, up, up_bias):
    """Go down to `size` numbers a token, bend them, go up again, and add the result to `y`."""
    # each line below leaves one part of the formula out, or puts it elsewhere
    low = linear(y, down, down_bias)  # (tokens, size)
    change = linear(gelu(low), up, up_bias)  # (tokens, d)
    yield change, "The adapter has a skip connection of its own. What is added to its result?"
    yield y + linear(low, up, up_bias), "Nothing is bent, so this could be folded into the weight. What is missing?"
    yield y + gelu(linear(low, up, up_bias)), "You bend at the end. How wide is a token where the paper bends it?"
    yield gelu(y + change), "You bend the sum. Where does the bottleneck bend?"
    yield y + linear(relu(low), up, up_bias), "You use relu. Which function does the formula name?"
    yield y + linear(gelu(linear(y, down)), up, up_bias), "You leave a bias out on the way down."
    yield y + linear(gelu(low), up), "You leave a bias out on the way up."
    yield y + linear(gelu(linear(y, down)), up), "You leave out both biases."


def my_learned(method, size, d, kv, layers):
    """Write down the shape of each tensor that learns in one layer, and how many layers have one."""
    lora = layers * size * (3 * d + kv)
    bottleneck = 2 * size * d + size + d
    right = {"lora": lora, "houlsby": 2 * layers * bottleneck, "prefix": 2 * layers * size * kv, "prompt": size * d}
    # by method: a wrong count for one may be the right one for another
    wrong = {
        "lora": {
            layers * size * 4 * d: "Is the output of v as wide as that of q? Look at `kv`.",
            size * (3 * d + kv): "That is one layer. How many have an adapter?",
            layers * size * (3 * d + d // 4): "The output of v is `kv` wide. In which of these models is that d / 4?",
            layers * size * 2 * d: "That is q alone. Which other weight has an adapter?",
        },
        "houlsby": {
            layers * bottleneck: "A layer has two parts, attention and feed-forward. Which of them has an adapter?",
            2 * layers * 2 * size * d: "You count the matrices. What is added after each of them?",
            2 * bottleneck: "That is one layer. How many have adapters?",
        },
        "prefix": {
            layers * size * kv: "That is for the keys. What else does attention read?",
            2 * layers * size * d: "How wide is a key here? Several queries can share one.",
            2 * size * kv: "That is one layer. Does the next one have the same prefix?",
        },
        "prompt": {
            layers * size * d: "A prompt stands before the first layer. Does the second one get another?",
            size * kv: "A prompt stands where embeddings do. How wide is an embedding?",
        },
    }
    # where kv equals d, a mistake gives the right number
    yield from ((value, hint) for value, hint in wrong[method].items() if value != right[method])


def my_attention(q, k, v, prefix_k, prefix_v, mask):
    """Print the mask after `pad`, beside the keys that it belongs to. Who may look at what?"""
    tokens = len(prefix_k)
    # the planted bug: `pad` fills with False, so nobody looks at the prefix
    hidden = torch.zeros(len(mask), tokens, dtype=torch.bool)
    seen = torch.ones_like(hidden)
    keys, values = torch.cat([prefix_k, k]), torch.cat([prefix_v, v])
    yield (
        _attention(q, keys, values, torch.cat([hidden, mask], 1)),
        "The prefix still changes nothing. With which value does `pad` fill the new columns?",
    )
    yield (
        _attention(q, keys, values, torch.ones(len(mask), tokens + mask.shape[1], dtype=torch.bool)),
        "Now a query also sees what the mask hides. Who may look at the prefix, and who at the rest?",
    )
    yield (
        _attention(q, keys, values, torch.cat([seen, torch.ones_like(mask).tril()], 1)),
        "You build a causal mask of your own. What may a query see according to `mask`?",
    )
    yield (
        _attention(q, keys, values, torch.cat([seen, mask], 1), width=8),
        "You divide by the root of 8. Is each query 8 wide?",
    )
    yield (
        _attention(q, keys, values, torch.cat([mask, seen], 1)),
        "Your mask has its new columns at the end. Where in the row are the prefix's keys?",
    )
    yield (
        _attention(q, keys, torch.cat([v, prefix_v]), torch.cat([seen, mask], 1)),
        "Keys and values no longer belong together. Which of them stand first?",
    )


def _attention(q, k, v, mask, width=None):
    scores = q @ k.t() / (width or q.shape[-1]) ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
