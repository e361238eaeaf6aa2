"""Compute published memory figures again: reproduce each to its last digit, or give the reason why that fails.

    published_memory() -> Replay: the published figure, the figure that follows from the sizes, do they agree?

Source: slides on QLoRA (their tables of bits per parameter, and of GB at 70 billion); QLoRA (arXiv 2305.14314) sections
1 to 3, tables 1 and 6, figure 6; LoRA (arXiv 2106.09685) section 4.2.
GB is 10^9 bytes here, MiB 2^20; if a source says MB and means MiB, the formula says so.
"""

from collections.abc import Iterator

from qlora_lab.measure.published import Chatbot, Elo, published, read_data
from qlora_lab.measure.replay import Replay
from qlora_lab.memory.predict import predict_memory
from qlora_lab.memory.shape import Shape, shape_of
from qlora_lab.quant.double_quant import GROUP_SIZE

GB = 1e9
MIB = 2**20
R = 64  # the paper's rank
SIZES = ("7b", "13b", "33b", "65b")
SLIDES = {  # bits per parameter: weights, gradients, optimizer, adapters
    "full": (16, 16, 64, 0),
    "lora": (16, 0.4, 0.8, 0.4),
    "qlora": (4, 0.4, 0.8, 0.4),
}
GPT3_LAYERS, GPT3_WIDTH, GPT3_WEIGHTS = 96, 12288, 175e9  # LoRA, section 4.2


def published_memory() -> dict[str, dict]:
    """Return key -> "value", "unit" and "what": data/published/memory.json, and the memory columns of tables 1 and 6.

    Raises FileNotFoundError without the course's data.
    """
    figures = dict(read_data("memory.json")["figures"])
    chatbots = published("chatgpt.csv", Chatbot)
    for name, system, bits in (("guanaco", "Guanaco", 4), ("vicuna", "Vicuna", 16), ("vicuna", "Open Assistant", 16)):
        for row in (row for row in chatbots if row.system == system):
            what = f"{bits}-bit {row.size}: memory"
            figures[f"slides.{name}.{row.size.lower()}"] = {"value": row.memory_gb, "unit": "GB", "what": what}
    (smallest,) = (row for row in published("elo.csv", Elo) if (row.table, row.system) == (1, "Guanaco 7B"))
    figures["paper.table1.7b"] = {"value": smallest.memory_gb, "unit": "GB", "what": "4-bit 7B: memory in table 1"}
    return figures


def replay_published() -> tuple[Replay, ...]:
    """Replay every published memory figure. Raises FileNotFoundError without the course's data."""
    figures = published_memory()
    sources = read_data("memory.json")["sources"]
    replays = {}
    for key, ours, formula, *reason in (*_slides(), *_chatbots(), *_figure(), *_text()):
        figure = figures[key]
        source = sources[key.split(".")[0]]
        reason = "".join(reason)
        replays[key] = Replay(key, figure["what"], figure["value"], figure["unit"], ours, formula, reason, source)
    return tuple(replays[key] for key in figures)  # in the order of the file


def constant_bits(block_size: int = 64, group_size: int = GROUP_SIZE) -> tuple[float, float]:
    """Count the bits per weight of the constants: in float32, and after double quantization."""
    return 32 / block_size, 8 / block_size + 32 / (block_size * group_size)  # paper, section 3: 0.373 bits saved


def slides_gb(method: str, parameters: float = 70e9) -> float:
    """Sum the slides' bits for a model of this size, in GB. method: "full", "lora" or "qlora"."""
    return sum(SLIDES[method]) * parameters / 8 / GB


def two_matrix_adapter(shape: Shape, r: int = R) -> int:
    """Count adapter weights as figure 6 does: q, k, v, o, and a feed-forward of two matrices, d to 4 d and back."""
    d = shape.hidden
    return shape.layers * r * (4 * (d + d) + 2 * (d + 4 * d))  # L r 18 d


def swiglu_adapter(shape: Shape, r: int = R) -> int:
    """Count adapter weights of the real model, whose gate, up and down have `inner` rows or columns."""
    return shape.layers * r * sum(linear.in_features + linear.out_features for linear in shape.linears)


Computed = tuple[str, float, str] | tuple[str, float, str, str]  # key, ours, formula, reason


def _slides() -> Iterator[Computed]:
    model = shape_of("llama-2-70b")
    share = swiglu_adapter(model) / model.parameters  # 1.2 %
    for method, (weight, gradient, optimizer, adapter) in SLIDES.items():
        yield f"slides.{method}.weight", float(weight), "of the data type"
        if method == "full":
            yield "slides.full.gradient", 16.0, "as a weight"
            yield "slides.full.optimizer", 64.0, "2 moments x 32 bits"
        else:
            words = "of LLaMA-2-70B are adapters of rank 64, all linear layers"
            yield f"slides.{method}.gradient", 32 * share, f"32 bits x {share:.2%} {words}"
            yield f"slides.{method}.adapter", 32 * share, f"32 bits x {share:.2%} {words}"
            yield f"slides.{method}.optimizer", 64 * share, f"64 bits x {share:.2%} {words}"
        total = weight + gradient + optimizer + adapter
        yield f"slides.{method}.total", total, "the sum of its row"
        reason = ("5.6 bits make 49 GB; 46 GB are 5.2 bits, one of the two 0.4 left out",) * (method == "qlora")
        yield f"slides.{method}.70b", slides_gb(method), f"{total:.1f} bits x 70e9 / 8", *reason
    before, after = constant_bits()
    yield "slides.constants.before", before, "32 / 64"
    yield "slides.constants.after", after, "8 / 64 + 32 / (64 x 256)"
    yield "slides.constants.saved", before - after, "the difference"
    adapter = 2 * 2 * GPT3_WIDTH * GPT3_LAYERS  # of rank 1, on queries and values
    words = "175e9 / (96 layers x 2 matrices x 2 x 12288 x 4), 10,000 is rounded"
    yield "slides.lora.checkpoint", GPT3_WEIGHTS / (4 * adapter), words, "9,271 times; the paper rounds 350 GB to 35 MB"
    yield "slides.lora.trained", adapter / 1e6, "96 layers x 2 matrices x 2 x 12288 x r, r = 1 and not 4"


def _chatbots() -> Iterator[Computed]:
    words = "figure 6: model and adapters, in GB"
    reasons = {"65b": "40.4 by figure 6", "13b": "9.4 by figure 6", "7b": "5.6 by figure 6; table 1 has 6"}
    for size in SIZES:
        both = sum(_bar(size, name) for name in ("model", "adapters")) * MIB / GB
        yield f"slides.guanaco.{size}", both, words, *((reasons[size],) if size in reasons else ())
    yield "paper.table1.7b", sum(_bar("7b", name) for name in ("model", "adapters")) * MIB / GB, words
    yield "slides.vicuna.33b", 33 * 2.0, "33e9 x 2 bytes; its real size, 32.5e9, makes 65"
    yield "slides.vicuna.13b", 13 * 2.0, "13e9 x 2 bytes"


def _bar(size: str, name: str) -> float:
    return float(read_data("memory.json")["figures"][f"paper.figure6.{size}.{name}"]["value"])


def _figure() -> Iterator[Computed]:
    for size in SIZES:
        shape = shape_of(f"llama-{size}")
        adapter = two_matrix_adapter(shape)
        yield f"paper.figure6.{size}.adapters", 2 * adapter / MIB, "L x 64 x 18 d x 2 bytes: two matrices, not SwiGLU"
        yield f"paper.figure6.{size}.optimizer", 8 * adapter / MIB, "L x 64 x 18 d x 8 bytes: two matrices, not SwiGLU"
        ledger = predict_memory(f"llama-{size}", r=R, double_quant=False)
        ours = ledger.group("weights") / MIB
        more = _bar(size, "model") - ours
        reason = f"{more:,.0f} MiB more than weights with constants that are not quantised: what they are is not said"
        yield f"paper.figure6.{size}.model", ours, "the ledger's weights, no double quantization", reason
        parts = _bar(size, "model") + _bar(size, "optimizer") + 2 * _bar(size, "adapters")
        left = 1000 * float(read_data("memory.json")["figures"][f"paper.figure6.{size}.total"]["value"]) - parts
        words = "bars, and gradients as large as adapters; 1000 MiB to a GB"
        what = f"{left:,.0f} MiB are left for input gradients"
        reason = what if left > 0 else f"its parts are {-left:,.0f} MiB more than the whole"
        yield f"paper.figure6.{size}.total", parts / 1000, words, reason


def _text() -> Iterator[Computed]:
    llama = shape_of("llama-7b")
    yield "paper.text.full", 65 * 96 / 8, "65e9 x 96 bits / 8"
    run = {"adapter_dtype": "bfloat16", "paged": True, "batch_size": 1, "length": 512, "gradient_checkpointing": True}
    ledger = predict_memory("llama-65b", r=R, padded=False, **run)
    words = "the ledger's peak: bf16 adapters, 32-bit moments in pages, one row of 512 tokens, checkpointing"
    yield "paper.text.qlora", ledger.peak / GB, words, "a bound; the ledger stays below it"
    needed = 567 * MIB / (2 * llama.layers * (3 * llama.hidden + llama.inner))
    at_512 = 512 * 2 * llama.layers * (3 * llama.hidden + llama.inner) / MIB
    reason = f"the length is not given: {needed:.0f} tokens make 567 MiB"
    yield "paper.text.inputs", at_512, "512 tokens x 32 layers x (3 d + f) x 2 bytes, in MiB", reason
    yield "paper.text.adapters", llama.parameters * 0.002 * 2 / MIB, "0.2 % of 6.74e9 x 2 bytes, in MiB"
    yield "paper.text.checkpointed", 567 / llama.layers, "567 / 32: one layer's at a time"
    yield "paper.text.base", _bar("7b", "model"), "figure 6's bar", "5,046 in the paper's own figure"
    before, after = constant_bits()
    yield "paper.text.saved", (before - after) * 65 / 8, "0.373 bits x 65e9 / 8"
