"""Describe the run that a memory ledger predicts: how the model is loaded, adapted, fed and optimised.

Defaults are those of load, add_lora and Settings.
Source: QLoRA section 3, equation 5, for the method. `adapter_dtype` covers the dtype policies of other libraries: PEFT
keeps adapters in float32, as this library does; TRL casts them to bf16.
"""

from dataclasses import dataclass
from functools import cached_property

from qlora_lab.memory.sight import LANGUAGE
from qlora_lab.quant.numbers import MOST, MOST_BYTES, check_number, check_whole
from qlora_lab.train.run_options import (
    METHOD_OPTIONS,
    RELATIVES,
    VIRTUAL,
    AdapterOptions,
    ModelOptions,
    documented,
    option,
    same_option,
)
from qlora_lab.train.settings import Settings

METHODS = ("qlora", *METHOD_OPTIONS)
METHOD_HELP = f"what is trained, and on what: {', '.join(METHODS)}"
LOW_RANK = ("qlora", "lora", *RELATIVES)
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DEVICES = ("cuda", "cpu")


@documented
@dataclass(frozen=True)
class Setup:
    """A run, without its model. Raises ValueError for a value that is not allowed."""

    # qlora quantises the linear layers and trains adapters, lora trains adapters on the original weights
    method: str = option("qlora", METHOD_HELP)
    codebook: str = option(
        ModelOptions.codebook, "data type of the quantised weights, such as nf4; none, for dora and so on: 16 bits"
    )
    also: tuple[str, ...] = same_option(ModelOptions, "also")
    block_size: int = same_option(ModelOptions, "block_size")
    double_quant: bool = same_option(ModelOptions, "double_quant")
    dtype: str = option("bfloat16", "data type of computation, and of everything that is not quantised")
    adapter_dtype: str = option(
        "float32", "data type of the adapters: float32, as finetune and PEFT use, or bfloat16, as TRL uses"
    )
    r: int = same_option(AdapterOptions, "r")
    targets: str | tuple[str, ...] = same_option(AdapterOptions, "targets")
    dropout: float = same_option(AdapterOptions, "dropout")
    parts: tuple[str, ...] | None = same_option(AdapterOptions, "parts")
    size: int = same_option(AdapterOptions, "size")
    virtual_tokens: int = same_option(AdapterOptions, "virtual_tokens")
    mlp: int | None = same_option(AdapterOptions, "mlp")
    batch_size: int = same_option(Settings, "batch_size")
    micro_batch_size: int | None = same_option(Settings, "micro_batch_size")
    length: int = option(Settings.max_length, "tokens per row", "tokens")
    # A LLaVA's picture takes 576 tokens, more than the default length: a run of text is one that can exist.
    pictures: int = option(0, "of a model that sees: pictures per row; their tokens count in its length")
    # with packing it decides how many rows a batch needs
    mean_length: int | None = option(None, "mean tokens per example, for --packing (default: a whole row)", "tokens")
    packing: bool = same_option(Settings, "packing")
    padded: bool = True  # rows differ in length, so attention takes a mask
    # only the rows of labels go through the head
    learned: float = option(0.25, "share of tokens that are labels, from 0 to 1")
    gradient_checkpointing: bool = same_option(Settings, "gradient_checkpointing")
    optimizer_bits: int = same_option(Settings, "optimizer_bits")
    optimizer_budget: int | None = same_option(Settings, "optimizer_budget")
    paged: bool = False  # moments in float32 pages; those of torch's AdamW have the parameter's dtype
    master_copies: bool = True  # float32 ones of 16-bit weights that learn, as finetune has them
    device: str = option("cuda", "where the run computes: cuda or cpu")
    fused_adapter: bool | None = None  # one product for weight and adapter, as on the CPU; None: as the device does
    wide_attention: bool | None = None  # computed in float32 (model/wide.py); None: as `load` decides on this machine
    pair_attention: bool | None = None  # computed by our kernel (model/pair_attention.py); None: the same

    def __post_init__(self):
        # imported here: torch costs a second, and the command line reads this class for its --help
        from qlora_lab.model.language_model import as_names
        from qlora_lab.quant.blocks import check_block_size
        from qlora_lab.quant.codebook import codebook

        object.__setattr__(self, "dtype", _name(self.dtype))  # torch.bfloat16 works as well as its name
        object.__setattr__(self, "adapter_dtype", _name(self.adapter_dtype))
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "also", as_names(self.also))
        if self.parts is not None:
            object.__setattr__(self, "parts", as_names(self.parts, "parts"))
        for name, allowed in (("method", METHODS), ("dtype", BYTES), ("adapter_dtype", BYTES), ("device", DEVICES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: choose from {', '.join(allowed)}")
        if self.optimizer_bits not in (32, 8):
            raise ValueError(f"optimizer_bits={self.optimizer_bits!r} is not allowed: moments have 32 or 8 bits")
        for name in ("r", "batch_size", "length", "size", "virtual_tokens"):
            check_whole(name, getattr(self, name))
        for name, most in (
            ("micro_batch_size", MOST),
            ("mean_length", MOST),
            ("mlp", MOST),
            ("optimizer_budget", MOST_BYTES),
        ):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1, most)
        if self.mean_length is not None and self.mean_length > self.length:
            raise ValueError(f"mean_length={self.mean_length} exceeds length={self.length}: give at most that")
        check_whole("pictures", self.pictures, 0)
        if self.parts == ():
            raise ValueError("parts names no module, so nothing would learn: name one, or leave parts out")
        if self.parts is not None and self.method != "full":
            raise ValueError(f"parts={self.parts} does not go with method={self.method!r}: choose method='full'")
        if self.also and not self.is_packed:
            raise ValueError(f"also={self.also} quantises, but this run does not: leave it out, or choose qlora")
        check_number("dropout", self.dropout, lambda share: 0 <= share < 1, "from 0 to below 1")
        check_number("learned", self.learned, lambda share: 0 <= share <= 1, "from 0 to 1")
        check_block_size(self.block_size)
        if self.codebook != "none":
            codebook(self.codebook)
        elif self.method in ("qlora", "loftq"):
            named = f"method={self.method!r}"
            raise ValueError(f"codebook='none' does not go with {named}, which quantises: choose method='lora'")
        if self.method == "dora" and self.dropout:
            raise ValueError(f"dropout={self.dropout} keeps what no row counts with method='dora': leave it at 0")
        if self.method == "loftq" and self.targets != "all-linear":
            raise ValueError(
                f"targets={self.targets!r} does not go with method='loftq', which adapts all: leave it out"
            )
        if self.method in VIRTUAL and self.packing:
            raise ValueError(f"rows cannot be packed with method={self.method!r}: leave out packing")
        if self.method == "prefix" and self.gradient_checkpointing:
            raise ValueError("method='prefix' cannot checkpoint gradients: leave out gradient_checkpointing")

    @cached_property
    def code_bits(self) -> int:
        """Bits of one code."""
        from qlora_lab.quant.codebook import bits_of, codebook

        return bits_of(codebook(self.codebook))

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
    def is_packed(self) -> bool:
        """Whether the linear layers are in 4 bits: also where parts that learn stand beside them."""
        beside = self.method == "full" and not self.whole
        return self.method == "qlora" or (self.codebook != "none" and (beside or self.method not in ("lora", "full")))

    @property
    def whole(self) -> bool:
        """Whether every weight of the language model learns, but for a head that parts does not name."""
        return self.method == "full" and (self.parts is None or LANGUAGE in self.parts)

    def learns(self, part: str) -> bool:
        """Tell whether a part of a model that sees learns as a whole."""
        return self.method == "full" and (self.parts is None or part in self.parts)

    @property
    def read_length(self) -> int:
        """Tokens of a row that go through the layers: in prompt tuning the virtual ones too."""
        return self.length + self.virtual_tokens * (self.method == "prompt")

    @property
    def key_length(self) -> int:
        """Tokens of a row that attention looks at."""
        return self.length + self.virtual_tokens * (self.method in VIRTUAL)

    @property
    def tokens(self) -> int:
        """Tokens that go through the model at once, padding included."""
        return self.rows * self.read_length

    @property
    def labels(self) -> int:
        """Labels at once, which are rows of logits."""
        return round(self.learned * self.rows * self.length)

    @property
    def masked(self) -> bool:
        """Whether attention takes a mask: transformers drops it if every row is full, as a single row always is.

        A prefix makes keys that no query belongs to, so it needs one.
        """
        return self.packing or (self.padded and self.rows > 1) or self.method == "prefix"

    @property
    def fused(self) -> bool:
        """Whether one product serves weight and adapter, as in Linear4bit on the CPU."""
        if self.fused_adapter is not None:
            return self.fused_adapter
        exact = self.adapter_dtype == "float32"  # the CPU kernel adds adapters in float32 only
        return self.device == "cpu" and self.is_packed and exact and not self.dropout

    @property
    def widens(self) -> bool:
        """Whether attention is computed in float32 although the model is not."""
        if self.dtype == "float32":
            return False
        if self.wide_attention is not None:
            return self.wide_attention
        from qlora_lab.kernels.product import race

        return self.device == "cpu" and not race().use_bfloat16  # bf16 products are slow on some processors

    @property
    def pairs(self) -> bool:
        """Whether attention is computed in pairs of bf16, if the heads have a size for that."""
        if self.pair_attention is not None:
            return self.pair_attention
        if self.dtype != "bfloat16" or self.device != "cpu":
            return False
        from qlora_lab.kernels import choose
        from qlora_lab.kernels.product import race
        from qlora_lab.kernels.words import has_pairs

        return has_pairs() and choose().product is not None and race().use_bfloat16  # as model/wide.py decides

    @property
    def copies(self) -> bool:
        """Whether the optimizer moves float32 copies of the weights."""
        return self.method == "full" and self.dtype != "float32" and self.master_copies

    @property
    def in_pages(self) -> bool:
        """Whether PagedAdamW holds the moments in pages, by the trainer's own rule."""
        return self.paged or self.optimizer_bits != 32 or self.optimizer_budget is not None

    def __str__(self) -> str:
        sizes = dict.fromkeys(RELATIVES, f", r={self.r}") | {"houlsby": f", size {self.size}"}
        sizes |= dict.fromkeys(VIRTUAL, f", {self.virtual_tokens} virtual tokens")
        full = "full fine-tuning" + f" of {', '.join(self.parts or ())}" * (self.parts is not None)
        names = {"full": full, "lora": f"LoRA, r={self.r}", "qlora": f"QLoRA, r={self.r}"}
        method = names.get(self.method) or f"{self.method}{sizes.get(self.method, '')}"
        weights = f", {self.codebook}/{self.block_size}{' + double quantization' * self.double_quant}"
        switches = ", gradient checkpointing" * self.gradient_checkpointing + ", packing" * self.packing
        return (
            f"{method}{weights if self.is_packed else ''}, {self.dtype}; {self.rows} x {self.length} tokens at "
            f"once{switches}; AdamW of {self.optimizer_bits} bits on {self.device}"
        )


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
