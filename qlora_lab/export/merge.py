"""Merge an adapter into its base, so that the model runs without it; and measure what that changed.

In: a model with an adapter, as it was trained. Out: a model folder, which transformers and `load` read:

    target        a layer's weight                       bytes of a weight
    dequantised   decoded W4 + scaling B A               2    what was trained
    original      W16 + scaling B A                      2    what most tools write
    requantised   quantize(decoded W4 + scaling B A)     0.5  4 bits again, with the settings that the base has

The adapter learned beside W4, so it also makes up for what quantisation lost; beside W16 it makes up for a loss that is
not there. In 4 bits most of a small change vanishes: a weight takes its old level again unless the change carries it
over a midpoint. So every merge compares the answers before and after (parity.py), and one that loses too much is not
kept.
Memory: the model that is given, one file of the result, and one layer in float32 (layerwise.py). For a model that is
not loaded, merge_folders.py.
But: what a killed merge has written is removed by the next one, which starts from the beginning.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from qlora_lab.adapters.lora import lora_layers
from qlora_lab.adapters.targets import linear_layers
from qlora_lab.export.layerwise import Reader, in_another_order, layerwise, reader, streamed
from qlora_lab.export.merged_weight import (
    Learned,
    finite,
    merged_in_4_bits,
    merged_in_16_bits,
    merged_stack_in_4_bits,
    packed,
)
from qlora_lab.export.parity import (
    SMALL_KL,
    Answers,
    Change,
    Parity,
    compare,
    divergence,
    log_probabilities,
    prompt_tokens,
)
from qlora_lab.files import disk
from qlora_lab.files.checksums import SUMS, as_lines, sha256
from qlora_lab.files.lock import locked_file, reserved
from qlora_lab.files.out_path import check_apart, out_folder, resolved
from qlora_lab.files.replace import replacing_folder
from qlora_lab.files.tensor_file import save_tensors
from qlora_lab.model.empty_model import dtypes_of, empty_model, fields_of, stored_options, tokenizer_of
from qlora_lab.model.experts import is_stack
from qlora_lab.model.fetch import known_name, resolve
from qlora_lab.model.layer_kinds import as_matrix, turned
from qlora_lab.model.model_files import CONFIG, INDEX
from qlora_lab.model.quantized_folder import PLAN, described, files_beside, has_own_head, pieces
from qlora_lab.quant.plan import DEFAULT, Candidate, load_plan
from qlora_lab.quant.quantize import dequantize
from qlora_lab.quant.stack import Quantized, QuantizedStack, dequantize_stack, stored_as

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TARGETS = ("dequantised", "original", "requantised")
REPORT = "parity.json"


@dataclass(frozen=True)
class Work:
    """What one merge reads and writes."""

    target: str
    source: Path  # the folder of configuration, tokenizer and, for `original`, weights
    empty: "PreTrainedModel"  # of the source: names and shapes
    read: Reader  # of what the adapter is added to
    trained: Reader  # of the base beside which it learned
    adapted: dict[str, Learned]  # name of a weight -> what is added to it
    names: list[str] = field(init=False)  # of the tensors to write
    dtypes: dict[str, torch.dtype] = field(init=False)

    def __post_init__(self):
        tied = self.empty.all_tied_weights_keys  # target -> source; an adapted head is no longer its embedding
        names = [name for name in self.empty.state_dict() if name not in tied or name in self.adapted]
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "dtypes", dtypes_of(self.empty, self.empty.dtype))

    @property
    def is_packed(self) -> bool:
        return self.target == "requantised"


def merge(
    model: "PreTrainedModel",
    out: str | Path,
    target: str = "dequantised",
    *,
    source: str | Path | None = None,
    anyway: bool = False,
    progress: bool = True,
) -> Parity:
    """Write `model`, merged with its adapter, to the new folder `out`, with the report parity.json. Returns the report.

    model: from `load`, with an adapter; it is left as it was. target: "dequantised", the decoded 4-bit weights plus the
    adapter in 16 bits, which is what was trained; "original", the original's weights plus the adapter; "requantised",
    4 bits again. source: what `load` was given, by default what the model is named; for "original" the original.
    anyway: keep a merge that is otherwise refused: one whose answers differ by more than a quarter of what the adapter
    changed, or by more than 0.05, in nats a token (KL). 0.001 is allowed, unless most of the change is lost.
    Raises ValueError for a refused merge, of which nothing is left; for a model without an adapter, an unknown target,
    a model that does not fit the source, and an `out` inside the source; FileExistsError unless `out` is new or empty;
    and what `load` raises.
    """
    check_target(target)
    lora_layers(model)  # raises without any
    out = out_folder(out)
    check_new(out)
    folder = resolve(known_name(model.name_or_path if source is None else source), progress=progress)
    check_apart(out, folder)
    with locked_file(out, "merge") as lock, reserved(lock):
        check_new(out)
        work = _work(model, folder, target)
        ids = prompt_tokens(model, tokenizer_of(folder))
        before = log_probabilities(model, ids)
        with _without_adapters(model):
            base = log_probabilities(model, ids)
        return finish(work, out, (ids, base, before), anyway, progress)


def finish(
    work: Work, out: Path, answers: tuple[torch.Tensor, torch.Tensor, torch.Tensor], anyway: bool, progress: bool
) -> Parity:
    """Write the merged model, compare it, and keep it if it passes. answers: the first three of Answers."""
    with replacing_folder(out) as staged, torch.no_grad():
        changes, packing = _write_weights(work, staged, progress)
        _write_rest(work, staged, packing)
        ids, base, adapter = answers
        after = log_probabilities(layerwise(staged), ids)
        rounding_kl = _rounding_kl(work, ids, base) if divergence(adapter, base) < SMALL_KL else 0.0
        parity = compare(Answers(*answers, after), work.target, changes, rounding_kl)
        if not (parity.passes or anyway):
            raise ValueError(_refusal(parity))
        _write_report(parity, staged)
    return parity


def _rounding_kl(work: Work, ids: torch.Tensor, base: torch.Tensor) -> float:
    """Return how far the base's answers move if they are computed in float32 and in another order."""
    model = streamed(empty_model(work.source, torch.float32), lambda name: work.trained(name).to("cpu"))
    return divergence(base, log_probabilities(in_another_order(model), ids))


def check_target(target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is not known: choose from {', '.join(TARGETS)}")


def check_new(out: str | Path) -> None:
    """Raise FileExistsError unless a merged model may be written to the folder `out`: nothing may be there yet."""
    out = out_folder(out)
    path = resolved(out)
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{out} is not empty: choose another folder for the merged model")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{out} is a file: choose another name for the merged model's folder")


@contextmanager
def _without_adapters(model: "PreTrainedModel") -> Iterator[None]:
    layers = lora_layers(model)
    for path, layer in layers.items():
        model.set_submodule(path, layer.base)
    try:
        yield
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)


def _work(model: "PreTrainedModel", source: Path, target: str) -> Work:
    empty = empty_to_write(source, target)
    layers = lora_layers(model)
    adapted = {weight_name(model, path): layer.change for path, layer in layers.items()}
    own = _own(model)
    read = reader(empty, source) if target == "original" else own
    untie(empty, model, target)
    work = Work(target, source, empty, read, own, adapted)
    check_fits(work, {name: _shape(own, empty, name) for name in work.names})
    return work


def empty_to_write(source: Path, target: str) -> "PreTrainedModel":
    """Return the empty model of `source` in the 16 bits of a merge. Raises ValueError for a source in 4 bits."""
    if target == "original" and (already := stored_options(source)):
        raise ValueError(f"{source} is in 4 bits, as {already}: name the original that it was made from as the source")
    config = fields_of(source)
    half = torch.float16 if "float16" in (config.get("dtype"), config.get("torch_dtype")) else torch.bfloat16
    return empty_model(source, half)


def untie(empty: "PreTrainedModel", model: "PreTrainedModel", target: str) -> None:
    """Give `empty` a head of its own where `model` has one, although config.json ties it. An original's files tell."""
    if target != "original":
        for name in empty.all_tied_weights_keys.keys() - model.all_tied_weights_keys.keys():
            del empty.all_tied_weights_keys[name]


def _own(model: "PreTrainedModel") -> Reader:
    layers = linear_layers(model)  # an adapted layer's base has the layer's path

    def read(name: str) -> torch.Tensor | Quantized:
        path, _, leaf = name.rpartition(".")
        module = layers[path] if path in layers else model.get_submodule(path)
        tensor = getattr(module, leaf)
        if isinstance(tensor, nn.Module):  # a stack of experts
            tensor = getattr(tensor, "base", tensor).weight
        if torch.is_tensor(tensor) and path in layers and leaf == "weight":
            return as_matrix(module, tensor)
        return turned(model, name, tensor) if torch.is_tensor(tensor) and is_stack(model, name) else tensor

    return read


def weight_name(model: nn.Module, path: str) -> str:
    """Return the name of the weight of a layer, or of the parameter that is a stack of experts."""
    return path if is_stack(model, path) else f"{path}.weight"


def _shape(own: Reader, empty: "PreTrainedModel", name: str) -> torch.Size | None:
    """Return the shape of the model's own tensor, as its family keeps it; None if there is none."""
    try:
        return turned(empty, name, torch.empty(own(name).shape, dtype=torch.float32, device="meta")).shape
    except AttributeError:
        return None


def check_fits(work: Work, shapes: dict[str, torch.Size | None]) -> None:
    """Raise ValueError unless the model that is merged, with tensors of these shapes, is one of its source."""
    expected = work.empty.state_dict()
    for name in work.names:
        shape = shapes.get(name)
        if shape != expected[name].shape:
            wanted = tuple(expected[name].shape)
            had = "missing" if shape is None else tuple(shape)
            raise ValueError(f"{work.source} has {name} as {wanted}, this model as {had}: name its folder")
    if extra := sorted(work.adapted.keys() - set(work.names)):
        raise ValueError(f"{work.source} has no {extra[0]}, which this model's adapter changes: name the right source")


# -------------------------------------------------------------------------------------------------------------- weights


def _write_weights(work: Work, staged: Path, progress: bool) -> tuple[dict[str, Change], dict[str, Candidate]]:
    """Write all tensors, and the index that says where each is.

    Returns layer -> what the merge did to it, and layer in 4 bits -> its options as they are stored with it.
    """
    changes = {}
    packing = {}
    weight_map = {}  # key -> the file that holds it
    size = 0  # bytes of all tensors
    expected = work.empty.state_dict()
    # Counted in 4 bytes a weight, so files are half as large: beside one, a layer lies in memory in float32.
    shards = pieces({name: 4 * expected[name].numel() for name in work.names})
    bar = tqdm(total=len(work.names), desc="merging", unit="tensor", disable=not progress)
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            bar.set_postfix_str(name.removeprefix("model."), refresh=False)
            base = work.read(name).to("cpu")
            if name in work.adapted:
                made, changes[name.removesuffix(".weight")] = _merged(work, name, base)
            else:
                made = _kept(work, name, base)
            if len(made) > 1:  # codes with their constants
                packing[name.removesuffix(".weight")] = Candidate(*stored_as(made, name))
            else:
                made = {name: turned(work.empty, name, made[name]).contiguous()}
            tensors |= made
            bar.update()
        save_tensors(tensors, staged / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    bar.close()
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    disk.write_text(staged / INDEX, json.dumps(index, indent=2) + "\n")
    return changes, packing


def _kept(work: Work, name: str, base: torch.Tensor | Quantized) -> dict[str, torch.Tensor]:
    """Return a tensor that no adapter changes, as the target stores it."""
    if isinstance(base, Quantized):
        decode = dequantize_stack if isinstance(base, QuantizedStack) else dequantize
        return packed(base, name) if work.is_packed else {name: decode(base, work.dtypes[name])}
    dtype = work.dtypes[name] if base.is_floating_point() else base.dtype
    return {name: finite(base.detach().to(dtype, copy=True), name)}  # a copy: it may be a view of a file


def _merged(work: Work, name: str, base: torch.Tensor | Quantized) -> tuple[dict[str, torch.Tensor], Change]:
    """Return an adapted weight, as the target stores it, and how it changed."""
    learned = work.adapted[name]
    if not (work.is_packed and isinstance(base, Quantized)):
        return merged_in_16_bits(base, learned, work.dtypes[name], name)
    again = merged_stack_in_4_bits if isinstance(base, QuantizedStack) else merged_in_4_bits
    q, change = again(base, learned, name)
    return packed(q, name), change


# ----------------------------------------------------------------------------------------------------------- the others


def _write_rest(work: Work, staged: Path, packing: dict[str, Candidate]) -> None:
    """Write configuration and tokenizer, so that the folder is a model."""
    config = fields_of(work.source)
    config.pop("quantization_config", None)  # the source's: of other files than those that were written
    if work.is_packed:
        config["quantization_config"] = _options(work, packing, staged)
    config.pop("torch_dtype", None)  # the older name
    config["dtype"] = str(work.dtypes[work.names[0]]).removeprefix("torch.")
    if has_own_head(work.empty, work.names):
        config["tie_word_embeddings"] = False
    disk.write_text(staged / CONFIG, json.dumps(config, indent=2) + "\n")
    for name in files_beside(work.source):
        disk.make_folder((staged / name).parent)
        disk.copy(work.source / name, staged / name)
    for shard in staged.glob("*.safetensors"):
        disk.copy_mode(staged / CONFIG, shard)  # safetensors lets only the owner read its files


def _options(work: Work, packing: dict[str, Candidate], staged: Path) -> dict:
    """Return the quantization_config of the layers in `packing`; a plan is copied where they need one."""
    kinds = set(packing.values())
    if not kinds:
        raise ValueError("no layer of this model is in 4 bits, so it cannot be requantised: choose another target")
    if len(kinds) == 1:
        return described(work.empty, kinds.pop(), None, list(packing))
    file = work.source / PLAN
    plan = load_plan(file) if file.exists() else None
    named = set() if plan is None else set(plan.chosen)
    # A plan may name no stack of experts; they are then packed as by default.
    planned = {path: kind for path, kind in packing.items() if path in named or not is_stack(work.empty, path)}
    if plan is None or plan.chosen != planned:
        raise ValueError(
            "layers of this model are quantised differently, by a plan: write the model with quantize_folder, load "
            "that folder with the adapter, and merge it"
        )
    disk.copy(file, staged / PLAN)
    return described(work.empty, DEFAULT, plan, list(packing))


def _refusal(parity: Parity) -> str:
    other = "" if parity.target == "dequantised" else "merge with target 'dequantised', or "
    if parity.verdict == "erased":
        arrived = "" if parity.arrived is None else f"{parity.arrived:.1%} of its change arrived in the weights, and "
        return (
            f"the merge has erased the adapter: {arrived}the answers are a KL of {parity.kl:.3g} nats a token from the "
            f"adapter model's and {parity.base_kl:.3g} from the base's, which are {parity.adapter_kl:.3g} apart; so it "
            f"was not kept: {other}keep it with anyway=True (--anyway)"
        )
    return (
        f"the merged model differs from the adapter model by a KL of {parity.kl:.3g} nats a token, but at most "
        f"{parity.most_kl:.3g} is allowed where the adapter itself changed {parity.adapter_kl:.3g} (the same best "
        f"token at {parity.agreement:.0%} of positions, perplexity {parity.perplexity_after:.4g} after "
        f"{parity.perplexity_before:.4g}), so it was not kept: {other}keep it with anyway=True (--anyway)"
    )


def _write_report(parity: Parity, staged: Path) -> None:
    disk.write_text(staged / REPORT, parity.as_json())
    names = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
    disk.write_bytes(staged / SUMS, as_lines({name: sha256(staged / name) for name in names}))
