"""Write a model folder as one GGUF file, which llama.cpp and the programs built on it run.

In: a model folder of a family in FAMILIES, such as `merge` writes; one in 4 bits is decoded. Out: one file with the
weights, the tokenizer and the chat template (gguf_vocabulary.py). It is read back and compared before it gets its name.
Source: the GGUF specification (ggml), and for its facts llama.cpp's convert_hf_to_gguf.py.

    format   bits of a weight   block of 32 weights
    f16      16                 none
    q8_0     8.5                8-bit codes, one step in float16: w = d q
    q4_1     5                  4-bit codes, a step and a minimum: w = d q + m
    q4_0     4.5                4-bit codes and a step: w = d (q - 8)

Vectors are float32. In 4 bits embedding and head are Q8_0, because every answer passes through them. A matrix whose
rows are not whole blocks is F16.
Families that llama.cpp rotates by neighbouring rows get their q and k rows in that order: gguf_in.py, point 2.
Memory: one tensor as it is stored, and PIECE weights of it a few times in float32; a layer in 4 bits whole in float32.

Not here: sliding windows, rope scaling but Llama 3's, biases but Qwen2's, experts: each is an error that names it.
"""

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind, LlamaFileType
from tqdm.auto import tqdm

from qlora_lab.export.gguf_vocabulary import add_vocabulary
from qlora_lab.export.layerwise import as_float, tensor_of
from qlora_lab.files import disk
from qlora_lab.files.home import expanded
from qlora_lab.files.lock import locked_file, reserved
from qlora_lab.files.out_path import check_apart, out_path, resolved
from qlora_lab.files.replace import replacing_file
from qlora_lab.model.empty_model import compute_buffers, empty_model, stored_options
from qlora_lab.model.fetch import resolve
from qlora_lab.model.gguf_in import LAYER_PARTS, OUTER_PARTS, neighbours_to_halves, open_gguf
from qlora_lab.model.packed import Packed, packed_tensors
from qlora_lab.model.stored import Stored, stored_tensors
from qlora_lab.quant.quantize import QuantizedTensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FORMATS = {
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_1": (Kind.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
BLOCK = 32  # weights
PIECE = 2**20  # weights, of whole rows, that are converted at once
# The most that a weight may be off, in units of the largest of its block (F16: of its own). Q4_0's levels end at 7/8 of
# the largest; Q4_1 has 15 steps from lowest to highest, and rounds the ends to float16 as well.
WORST = {Kind.F32: 0.0, Kind.F16: 2**-11, Kind.Q8_0: 1 / 253, Kind.Q4_0: 1 / 7.9, Kind.Q4_1: 1 / 14.5}


@dataclass(frozen=True)
class Family:
    """How llama.cpp knows a family of transformers."""

    architecture: str
    neighbours: bool = False  # rotary embedding by neighbouring rows, so q and k are stored in another order
    parts: dict[str, str] = field(default_factory=dict)  # more of a layer: transformers' part -> GGUF's


PLAIN = {f"{theirs}.weight": f"{ours}.weight" for ours, theirs in LAYER_PARTS.items()}
OUTER = {f"{theirs}.weight": f"{ours}.weight" for ours, theirs in OUTER_PARTS.items()}
BIASES = {f"self_attn.{name}_proj.bias": f"attn_{name}.bias" for name in "qkv"}
NORMS = {f"self_attn.{name}_norm.weight": f"attn_{name}_norm.weight" for name in "qk"}
FAMILIES = {
    "llama": Family("llama", neighbours=True),
    "mistral": Family("llama", neighbours=True),
    "qwen2": Family("qwen2", parts=BIASES),
    "qwen3": Family("qwen3", parts=NORMS),
}
FACTORS = "rope_freqs.weight"  # Llama 3's rope scaling: (head_dim / 2,)


@dataclass(frozen=True)
class Part:
    """One tensor of the file."""

    name: str  # transformers'
    shape: torch.Size
    stored: Stored | Packed
    kind: Kind
    heads: int = 0  # of q or k in a family that is rotated by neighbours

    @property
    def step(self) -> int:
        """Rows of a matrix in a piece: whole heads where their rows are turned. A vector is one piece."""
        unit = self.shape[0] // self.heads if self.heads else 1
        return unit * max(1, PIECE // self.shape[-1] // unit)

    def pieces(self) -> Iterator[np.ndarray]:
        """Yield its rows in float32, in transformers' order."""
        tensor = self.stored.read()
        tensor = as_float(tensor) if isinstance(tensor, QuantizedTensor) else tensor
        for rows in tensor.split(self.step) if tensor.dim() > 1 else [tensor]:
            yield rows.float().numpy()

    def heads_in(self, rows: np.ndarray) -> int:
        return len(rows) * self.heads // self.shape[0]


@dataclass(frozen=True)
class Written:
    """What to_gguf wrote. relative_error: root mean square of all weights' errors, divided by that of the weights."""

    file: Path
    format: str
    bytes: int
    tensors: int
    relative_error: float


def to_gguf(name_or_path: str | Path, out: str | Path, format: str = "q8_0", *, progress: bool = True) -> Written:
    """Write a model as the new file `out`, in GGUF. Returns what was written, and how exact it is.

    name_or_path: as for `load`, usually the folder that `merge` wrote; weights in 4 bits are decoded. format: "f16",
    "q8_0", "q4_1" or "q4_0".
    Raises ValueError, naming it, for a family, a tokenizer or a setting that llama.cpp would read differently, for an
    unknown format, for weights that the format cannot hold, and for an `out` inside the model's folder;
    FileExistsError where `out` exists; and what `load` raises. Then nothing is left.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not known: choose from {', '.join(FORMATS)}")
    out = out_path(out)
    _check_new(out)
    folder = resolve(name_or_path, progress=progress)
    check_apart(out, folder)
    with locked_file(out, "gguf") as lock, reserved(lock):
        _check_new(out)
        model = empty_model(folder, torch.float32)
        parts = _parts(model, folder, check_family(model), format)
        with replacing_file(out) as new:
            title = _title(name_or_path)
            _write(model, folder, parts, new, Header(title, format, _factors(model)), progress)
            error = _compare(parts, new, progress)
            size = new.stat().st_size
    return Written(out, format, size, len(parts), error)


def _title(name_or_path: str | Path) -> str:
    """Return a known name, the last part of a hub id, or the name of a folder, which ".." does not tell."""
    path = expanded(name_or_path)
    return resolved(path).name if path.name in ("", "..") else path.name


def _check_new(out: Path) -> None:
    if resolved(out).exists():
        raise FileExistsError(f"{out} exists already: choose another name for the GGUF file")


def check_family(model: "PreTrainedModel") -> Family:
    """Return the family. Raises ValueError, naming it, for what llama.cpp would compute differently."""
    config = model.config
    kind = config.model_type
    if kind not in FAMILIES:
        raise ValueError(f"this family ({kind}) is not written as GGUF: choose from {', '.join(FAMILIES)}")
    rope = config.rope_parameters
    scaling = rope["rope_type"]
    wrong = {
        f"hidden_act {config.hidden_act!r}": config.hidden_act not in ("silu", "swish"),
        "a sliding window": _has_window(config),
        f"rope scaling {scaling!r}": scaling not in ("default", "llama3") or (scaling == "llama3" and kind != "llama"),
        "a partial rotary embedding": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "attention_bias": kind != "qwen2" and getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
    }
    if named := [what for what, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(f"this model has {named[0]}, which is not written as GGUF: use another program for it")
    return FAMILIES[kind]


def _has_window(config: "PretrainedConfig") -> bool:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    full = set(kinds) <= {"full_attention"} if kinds else window is None
    return not full and (window is None or window < config.max_position_embeddings)


def _head_dim(config: "PretrainedConfig") -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# -------------------------------------------------------------------------------------------------------------- tensors


def _parts(model: "PreTrainedModel", folder: Path, family: Family, format: str) -> dict[str, Part]:
    """Return GGUF's name -> tensor, in the model's order."""
    stored = (packed_tensors if stored_options(folder) else stored_tensors)(model, folder)
    tied = model.all_tied_weights_keys  # target -> source: the head is stored only if it is another
    heads = {"attn_q.weight": model.config.num_attention_heads, "attn_k.weight": model.config.num_key_value_heads}
    expected = model.state_dict()
    parts = {}
    for name in expected:
        if name in tied:
            continue
        ours = _gguf_name(name, family)
        turned = heads.get(ours.split(".", 2)[-1], 0) if family.neighbours else 0
        shape = expected[name].shape
        parts[ours] = Part(name, shape, tensor_of(name, stored, model), _kind(ours, shape, format), turned)
    return parts


def _gguf_name(name: str, family: Family) -> str:
    if name in OUTER:
        return OUTER[name]
    head, _, part = name.removeprefix("model.layers.").partition(".")
    inside = PLAIN | family.parts
    if not (head.isdigit() and part in inside):
        raise ValueError(f"{name} has no place in a GGUF file of the architecture {family.architecture!r}")
    return f"blk.{head}.{inside[part]}"


def _kind(name: str, shape: torch.Size, format: str) -> Kind:
    chosen, _ = FORMATS[format]
    if len(shape) == 1:
        return Kind.F32
    if chosen != Kind.F16 and shape[-1] % BLOCK:
        return Kind.F16
    is_outer = name in OUTER.values()
    return Kind.Q8_0 if is_outer and chosen in (Kind.Q4_0, Kind.Q4_1) else chosen


def halves_to_neighbours(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo gguf_in.neighbours_to_halves: rows x0 x1 ... y0 y1 ... of a head become x0 y0 x1 y1 ..."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[1])  # (n_heads, 2, head_dim / 2, in_features)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _factors(model: "PreTrainedModel") -> np.ndarray | None:
    """Return by what Llama 3's scaling divides each frequency, (head_dim / 2,) float32; None without scaling."""
    rope = model.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    compute_buffers(model, torch.device("cpu"))
    scaled = model.model.rotary_emb.inv_freq.double()
    # transformers knows how to scale; llama.cpp wants the quotient, so nothing of the rule is repeated here.
    plain = rope["rope_theta"] ** (-torch.arange(len(scaled), dtype=torch.float64) / len(scaled))
    return (plain / scaled).float().numpy()


# -------------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Header:
    """What the file says beside its tensors and the model's own sizes."""

    title: str  # the model's name
    format: str
    factors: np.ndarray | None  # of Llama 3's rope scaling


def _write(
    model: "PreTrainedModel", folder: Path, parts: dict[str, Part], new: Path, header: Header, progress: bool
) -> None:
    factors = header.factors
    with closing(gguf.GGUFWriter(new, FAMILIES[model.config.model_type].architecture)) as writer:
        writer.add_name(header.title)
        _add_sizes(writer, model.config)
        writer.add_file_type(FORMATS[header.format][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(writer, folder, model)
        if factors is not None:
            writer.add_tensor_info(FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for name, part in parts.items():
            _add_info(writer, name, part)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()  # where each tensor will lie
    # The rest by disk.py: numpy, by which gguf writes, does not say why a disk refused.
    with disk.open_for(new, "ab") as file:
        _pad(file)
        if factors is not None:
            disk.write_all(file, factors.tobytes())
            _pad(file)
        for name, part in tqdm(parts.items(), "writing GGUF", unit="tensor", disable=not progress):
            written = sum(_write_rows(file, part, rows) for rows in part.pieces())
            assert written == _nbytes(part), f"{name} takes {written:,} bytes, not {_nbytes(part):,}"
            _pad(file)


def _write_rows(file, part: Part, rows: np.ndarray) -> int:
    """Write a piece of a tensor; return its bytes."""
    rows = halves_to_neighbours(rows, part.heads_in(rows)) if part.heads else rows
    with np.errstate(over="ignore"):  # infinity, which _compare finds and names
        packed = gguf.quantize(rows, part.kind)
    disk.write_all(file, memoryview(np.ascontiguousarray(packed)).cast("B"))
    return packed.nbytes


def _pad(file) -> None:
    disk.write_all(file, bytes(-file.seek(0, 2) % gguf.GGUF_DEFAULT_ALIGNMENT))


def _add_info(writer: gguf.GGUFWriter, name: str, part: Part) -> None:
    writer.add_tensor_info(name, part.shape, np.dtype(np.float32), _nbytes(part), raw_dtype=part.kind)


def _nbytes(part: Part) -> int:
    weights, size = gguf.GGML_QUANT_SIZES[part.kind]  # of a block
    return part.shape.numel() // weights * size


def _add_sizes(writer: gguf.GGUFWriter, config: "PretrainedConfig") -> None:
    head = _head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    # Not always hidden_size / heads: Qwen3 has wider heads.
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


# -------------------------------------------------------------------------------------------------------------- reading


def decoded(file: Path, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (transformers' name, weights) for a file that to_gguf made of `folder`: float32, in transformers' order."""
    model = empty_model(folder, torch.float32)
    parts = _parts(model, folder, check_family(model), "f16")  # any format: names and heads are the same
    for tensor in _tensors(file):
        part = parts[tensor.name]
        yield part.name, np.concatenate(list(_read(file, tensor, part)))


def _tensors(file: Path) -> list[gguf.ReaderTensor]:
    return [tensor for tensor in open_gguf(file).tensors if tensor.name != FACTORS]


def _read(file: Path, tensor: gguf.ReaderTensor, part: Part) -> Iterator[np.ndarray]:
    """Yield the rows of a tensor in the file as Part.pieces does."""
    view = np.atleast_2d(tensor.data)  # of the mapped file, whose pages would stay in memory: read instead
    for start in range(0, len(view), part.step):
        rows = view[start : start + part.step]
        offset = tensor.data_offset + start * view[0].nbytes
        packed = np.fromfile(file, view.dtype, rows.size, offset=offset).reshape(rows.shape)
        weight = gguf.dequantize(packed, tensor.tensor_type).reshape(-1, *part.shape[1:])  # a vector is one row there
        yield neighbours_to_halves(weight, part.heads_in(weight)) if part.heads else weight


def _compare(parts: dict[str, Part], new: Path, progress: bool) -> float:
    """Return the relative error of all weights as read back. Raises ValueError for a tensor that its kind cannot hold.

    A block of 32 weights has a root mean square of at least its largest divided by sqrt(32), so a matrix is off by at
    most sqrt(32) WORST of itself. Rows in a wrong order would be off by about sqrt(2).
    """
    errors = weights = 0.0  # sums of squares
    bar = tqdm(_tensors(new), "reading it back", unit="tensor", disable=not progress)
    for (expected, part), tensor in zip(parts.items(), bar, strict=True):
        assert expected == tensor.name, f"{tensor.name} lies where {expected} belongs"
        size = off = 0.0
        for original, rows in zip(part.pieces(), _read(new, tensor, part), strict=True):
            size += _squares(original)
            off += _squares(np.subtract(rows, original, out=rows))
        limit = math.sqrt(BLOCK if part.kind != Kind.F16 else 1) * WORST[part.kind]
        if not off <= limit**2 * size:  # NaN and infinity too
            raise ValueError(
                f"{part.name} comes back from {part.kind.name} with an error of {math.sqrt(off / size):.1%}, "
                f"above {limit:.2%}: its values are too large or too small for float16, so GGUF cannot hold them"
            )
        errors += off
        weights += size
    return math.sqrt(errors / weights) if weights else 0.0


def _squares(matrix: np.ndarray) -> float:
    """Sum the squares of all entries: a row in float32, the rows in float64, so that a large one loses no digits."""
    rows = matrix.reshape(-1, matrix.shape[-1])
    return float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))
