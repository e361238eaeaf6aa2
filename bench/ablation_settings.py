"""The settings of bench/ablations.py: what is trained, on what, and how fast.

Each setting has a name, by which rows are read. A name says what differs from LoRA of rank 16 on all linear layers of
the 16-bit model. Alpha is 16 at every rank, as in QLoRA's own search: the update B A grows with r, and alpha / r takes
that back, so one learning rate serves all ranks.

Equal trainable parameters, for SmolLM2-135M: 4,884,480 for LoRA of rank 16, for a bottleneck of 70 (0.2 % less) and
for a prefix of 424 tokens; DoRA's magnitudes add 3 %. Biases are 155,520 numbers, and no more can be had, so they are
compared with a LoRA of that size: rank 1 on four of the seven kinds of layers. So is a prompt, of which 8,480 tokens
would not fit into the context.
Equal memory: the largest size of each method whose ledger is at most LoRA's (tests/test_ablations_bench.py computes
them again).
"""

from dataclasses import dataclass, field, replace
from typing import Any

STEPS = 16
LOOKED, FIRST = 0, 1  # the seed that the learning rates were chosen with, and the first of those that are compared
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
FOUR = ["q_proj", "k_proj", "o_proj", "gate_proj"]  # 1152 + 768 + 1152 + 2112 numbers a layer, as many as biases


@dataclass(frozen=True)
class Setting:
    """One way to train. It is the part of a row's config that differs between settings."""

    method: str
    lr: float
    options: dict[str, Any] = field(default_factory=dict)  # of add_adapter
    codebook: str | None = None  # None: the weights have 16 bits
    double_quant: bool = False
    lora_plus: float = 1
    steps: int = STEPS
    rouge: bool = False  # also write answers, and measure ROUGE-L


# The best of group "rates": the lowest held-out loss with a seed that is not compared. It was looked for with the
# settings of LOOKED_AT only. DoRA and LoftQ start as LoRA with the same scaling, and their papers keep its rate.
RATES = {"lora": 1e-3, "rslora": 3e-4, "dora": 1e-3, "pissa": 1e-4, "loftq": 1e-3, "lora+": 1e-4}
RATES |= {"full": 1e-4, "houlsby": 1e-3, "prefix": 1e-2, "prompt": 3e-2, "zero_bias": 1e-3}
TRIED = dict.fromkeys(("lora", "houlsby"), (3e-4, 1e-3, 3e-3)) | {"rslora": (1e-4, 3e-4, 1e-3)}
TRIED |= {"pissa": (3e-5, 1e-4, 3e-4, 1e-3), "lora+": (3e-5, 1e-4, 3e-4), "full": (3e-5, 1e-4, 3e-4)}
TRIED |= {"zero_bias": (3e-4, 1e-3, 3e-3, 1e-2), "prefix": (3e-3, 1e-2, 3e-2), "prompt": (1e-2, 3e-2, 1e-1)}


def lora(r: int = 16, targets: str | list[str] = "all-linear", alpha: float = 16, **more: Any) -> Setting:
    """LoRA at its rate. more: fields of Setting, and dropout."""
    options = {"r": r, "alpha": alpha, "targets": targets}
    options |= {"dropout": more.pop("dropout")} if "dropout" in more else {}
    return Setting("lora", more.pop("lr", RATES["lora"]), options, **more)


def relative(method: str, **more: Any) -> Setting:
    return Setting(method, RATES[method], {"r": 16, "alpha": 16}, **more)


NF4_DQ = {"codebook": "nf4", "double_quant": True}
METHODS = {
    "lora r=16": lora(rouge=True),
    "rslora r=16": relative("rslora", rouge=True),
    "dora r=16": relative("dora", rouge=True),
    "pissa r=16": relative("pissa", rouge=True),
    "lora+ r=16": lora(lr=RATES["lora+"], lora_plus=16, rouge=True),
    "houlsby size=70": Setting("houlsby", RATES["houlsby"], {"size": 70}, rouge=True),
    "prefix 424 tokens": Setting("prefix", RATES["prefix"], {"virtual_tokens": 424}, rouge=True),
    "full": Setting("full", RATES["full"], rouge=True),
    "lora r=16, nf4+dq": lora(**NF4_DQ, rouge=True),
    "loftq r=16, nf4+dq": relative("loftq", **NF4_DQ, rouge=True),
    "zero_bias": Setting("zero_bias", RATES["zero_bias"], rouge=True),
    "prompt 270 tokens": Setting("prompt", RATES["prompt"], {"virtual_tokens": 270}, rouge=True),
}
ZOO = METHODS | {
    "lora r=1, four kinds of layer": lora(1, FOUR, rouge=True),
    "prefix 14 tokens": Setting("prefix", RATES["prefix"], {"virtual_tokens": 14}, rouge=True),
}
LAYERS = {
    "lora r=16, query and value": lora(16, ["q_proj", "v_proj"]),
    "lora r=16, attention": lora(16, ATTENTION),
    "lora r=16, feed-forward": lora(16, FEED_FORWARD),
    "lora r=85, query and value": lora(85, ["q_proj", "v_proj"]),
    "lora r=42, attention": lora(42, ATTENTION),
    "lora r=26, feed-forward": lora(26, FEED_FORWARD),
}
WEIGHTS = {
    "lora r=16, fp4": lora(codebook="fp4"),
    "lora r=16, nf4": lora(codebook="nf4"),
}
RANKS = {f"lora r={r}": lora(r) for r in (2, 8, 64)}
LEARNING_RATES = {f"lora r=16, lr x {factor:g}": lora(lr=RATES["lora"] * factor) for factor in (0.1, 0.3, 3, 10)}
LEARNING_RATES |= {f"full, lr x {factor:g}": Setting("full", RATES["full"] * factor) for factor in (0.1, 10)}
ALPHAS = {f"lora r=16, alpha={alpha}": lora(alpha=alpha) for alpha in (4, 64)}
DROPOUTS = {f"lora r=16, dropout={share}": lora(dropout=share) for share in (0.05, 0.1)}
MEMORY = {
    "houlsby size=101": Setting("houlsby", RATES["houlsby"], {"size": 101}),
    "prefix 303 tokens": Setting("prefix", RATES["prefix"], {"virtual_tokens": 303}),
    "prompt 57 tokens": Setting("prompt", RATES["prompt"], {"virtual_tokens": 57}),
    "lora r=55, nf4+dq": lora(55, **NF4_DQ),
}


def at_rate(name: str, setting: Setting, method: str) -> dict[str, Setting]:
    return {f"{name}, lr {rate:g}, seed 0": replace(setting, lr=rate, rouge=False) for rate in TRIED[method]}


def method_of(name: str) -> str:
    """The method that a name begins with, as RATES has it."""
    return name.split()[0]


# A prompt of 270 tokens takes four times as long as any other setting, so its rate is looked for with 20.
ONCE = {name: METHODS[name] for name in METHODS if name not in ("lora r=16, nf4+dq", "prompt 270 tokens")}
ONCE |= {"prompt 20 tokens": Setting("prompt", RATES["prompt"], {"virtual_tokens": 20})}
LOOKED_AT = {name: setting for name, setting in ONCE.items() if method_of(name) in TRIED}
LOOKED_AT |= {name: ZOO[name] for name in ("lora r=1, four kinds of layer", "prefix 14 tokens")}
RATE_SEARCH = {}
for _name, _setting in LOOKED_AT.items():
    RATE_SEARCH |= at_rate(_name, _setting, method_of(_name))
SIXTY = {f"{name}, 60 steps": replace(setting, steps=60, rouge=False) for name, setting in ONCE.items()}

ALL_LINEAR = ("lora r=16",)  # what these groups are compared with
GROUPS = {  # the most important first
    "zoo": [*ZOO],
    "layers": [*ALL_LINEAR, *LAYERS],
    "weights": [*ALL_LINEAR, "lora r=16, nf4+dq", *WEIGHTS],
    "rank": [*ALL_LINEAR, *RANKS],
    "learning rate": [*ALL_LINEAR, *LEARNING_RATES],
    "memory": [*ALL_LINEAR, "zero_bias", *MEMORY],
    "alpha": [*ALL_LINEAR, *ALPHAS],
    "dropout": [*ALL_LINEAR, *DROPOUTS],
    "sixty": [*SIXTY],
    "rates": [*RATE_SEARCH],
}
SETTINGS = ZOO | LAYERS | WEIGHTS | RANKS | LEARNING_RATES | ALPHAS | DROPOUTS | MEMORY | RATE_SEARCH | SIXTY
AT_RANK_16 = {name: LAYERS[name] for name in LAYERS if "r=16" in name}
SMALL = {name: replace(setting, rouge=False) for name, setting in (METHODS | AT_RANK_16).items()}


def seeds_of(group: str, seeds: int) -> range:
    """The rates were looked for with one seed, which is never compared; 60 steps are run once."""
    if group == "rates":
        return range(LOOKED, LOOKED + 1)
    return range(FIRST, FIRST + (1 if group == "sixty" else seeds))
