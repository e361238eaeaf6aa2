"""Describe the run that a memory ledger predicts: how the model is loaded, adapted, fed and optimised.

In: the user's numbers and names. Out: one frozen Setup, whose defaults are those of load, add_lora and Settings.
Source: QLoRA section 3, equation 5, for the method. `adapter_dtype` covers the dtype policies of other libraries: PEFT
keeps adapters in float32, as this library does; TRL casts them to bf16.

Not here: the model's sizes (shape.py).
"""

from dataclasses import dataclass
from functools import cached_property

from qlora_lab.kernels.product import race
from qlora_lab.optim.paged_adamw import UNIT
from qlora_lab.quant.blocks import check_block_size
from qlora_lab.quant.codebook import bits_of, codebook as named_codebook
from qlora_lab.quant.numbers import MOST, MOST_BYTES, check_number, check_whole
from qlora_lab.train.settings import Settings

METHODS = ("qlora", "lora", "full")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class Setup:
    """A run, without its model. Raises ValueError for a value that is not allowed.

    method: "qlora" quantises the linear layers and trains adapters, "lora" trains adapters on the original weights,
    "full" trains all weights. mean_length, with packing, decides how many rows a batch needs.
    """

    method: str = "qlora"
    codebook: str = "nf4"
    block_size: int = 64  # weights that share a constant
    double_quant: bool = True
    dtype: str = "bfloat16"  # of the computation, and of every weight that is not quantised
    adapter_dtype: str = "float32"
    r: int = 16
    targets: str | tuple[str, ...] = "all-linear"  # or the names of the linear layers with an adapter
    dropout: float = 0.0
    batch_size: int = Settings.batch_size  # examples of a step
    micro_batch_size: int | None = None  # rows at once; None: all rows of a step
    length: int = Settings.max_length  # tokens of a row
    mean_length: int | None = None  # tokens of a mean example; None: `length`
    packing: bool = False
    padded: bool = True  # rows differ in length, so attention takes a mask
    learned: float = 0.25  # share of tokens that are labels: only their rows go through the head
    gradient_checkpointing: bool = False
    optimizer_bits: int = 32  # of each moment
    optimizer_budget: int | None = None  # bytes of moments in memory; None: all
    paged: bool = False  # moments in float32 pages; those of torch's AdamW have the parameter's dtype
    device: str = "cuda"
    fused_adapter: bool | None = None  # one product for weight and adapter, as on the CPU; None: as the device does
    wide_attention: bool | None = None  # computed in float32 (model/wide.py); None: as `load` decides on this machine

    def __post_init__(self):
        object.__setattr__(self, "dtype", _name(self.dtype))  # torch.bfloat16 works as well as its name
        object.__setattr__(self, "adapter_dtype", _name(self.adapter_dtype))
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        for name, allowed in (("method", METHODS), ("dtype", BYTES), ("adapter_dtype", BYTES), ("device", DEVICES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: choose from {', '.join(allowed)}")
        if self.optimizer_bits not in tuple(UNIT):
            raise ValueError(f"optimizer_bits={self.optimizer_bits!r} is not allowed: moments have 32 or 8")
        for name in ("r", "batch_size", "length"):
            check_whole(name, getattr(self, name))
        for name, most in (("micro_batch_size", MOST), ("mean_length", MOST), ("optimizer_budget", MOST_BYTES)):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1, most)
        if self.mean_length is not None and self.mean_length > self.length:
            raise ValueError(f"mean_length={self.mean_length} exceeds length={self.length}: give at most that")
        check_number("dropout", self.dropout, lambda share: 0 <= share < 1, "from 0 to below 1")
        check_number("learned", self.learned, lambda share: 0 <= share <= 1, "from 0 to 1")
        check_block_size(self.block_size)
        named_codebook(self.codebook)

    @property
    def element(self) -> int:
        """Bytes of one element of `dtype`."""
        return BYTES[self.dtype]

    @cached_property
    def code_bits(self) -> int:
        """Bits of one code."""
        return bits_of(named_codebook(self.codebook))

    @property
    def batch_rows(self) -> int:
        """Rows of a step: one per example, or, with packing, the fewest that hold all tokens."""
        if not self.packing:
            return self.batch_size
        return -(-self.batch_size * (self.mean_length or self.length) // self.length)  # rounded up

    @property
    def rows(self) -> int:
        """Rows that go through the model at once."""
        return min(self.batch_rows, self.micro_batch_size or self.batch_rows)

    @property
    def micro_batches(self) -> int:
        return -(-self.batch_rows // self.rows)

    @property
    def tokens(self) -> int:
        """Tokens that go through the model at once, padding included."""
        return self.rows * self.length

    @property
    def labels(self) -> int:
        """Labels at once, which are rows of logits."""
        return round(self.learned * self.tokens)

    @property
    def masked(self) -> bool:
        """Whether attention takes a mask: transformers drops it if every row is full, as a single row always is."""
        return self.packing or (self.padded and self.rows > 1)

    @property
    def fused(self) -> bool:
        """Whether one product serves weight and adapter, as in Linear4bit on the CPU."""
        if self.fused_adapter is not None:
            return self.fused_adapter
        exact = self.adapter_dtype == "float32"  # the CPU kernel adds adapters in float32 only
        return self.device == "cpu" and self.method == "qlora" and exact and not self.dropout

    @property
    def widens(self) -> bool:
        """Whether attention is computed in float32 although the model is not."""
        if self.dtype == "float32":
            return False
        if self.wide_attention is not None:
            return self.wide_attention
        return self.device == "cpu" and not race().use_bfloat16  # bf16 products are slow on some processors

    @property
    def in_pages(self) -> bool:
        """Whether PagedAdamW holds the moments in pages, by the trainer's own rule."""
        return self.paged or self.optimizer_bits != 32 or self.optimizer_budget is not None

    def __str__(self) -> str:
        method = {"full": "full fine-tuning", "lora": f"LoRA, r={self.r}", "qlora": f"QLoRA, r={self.r}"}[self.method]
        weights = f", {self.codebook}/{self.block_size}{' + double quantization' * self.double_quant}"
        switches = ", gradient checkpointing" * self.gradient_checkpointing + ", packing" * self.packing
        return (
            f"{method}{weights if self.method == 'qlora' else ''}, {self.dtype}; {self.rows} x {self.length} tokens at "
            f"once{switches}; AdamW of {self.optimizer_bits} bits on {self.device}"
        )


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
