"""Write a model folder with linear layers in 4 bits: made once, piece by piece, and then mapped in seconds.

In: whatever `load` takes. Out: a folder with config.json, the tokenizer, and safetensors by bitsandbytes' key names.
`load` maps it, and so does transformers with bitsandbytes, if bitsandbytes can. If not, config.json has
quant_method "qlora_lab", at which others stop, and says why.
Source: quant/serialize.py for the keys, transformers' BitsAndBytesConfig for config.json.

The work is cut into pieces of at most PIECE bytes, each written beside its place and renamed. Repeating an interrupted
call continues after its last whole piece, and the folder is the same to the byte. config.json comes last: without it
the folder is not a model yet.
Peak memory: one piece, quantised, and the largest tensor.
"""

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from qlora_lab.files import disk
from qlora_lab.files.checksums import replace_sums
from qlora_lab.files.lock import LOCK, locked_folder
from qlora_lab.files.out_path import check_apart, out_folder
from qlora_lab.files.ownership import MARK, QUANTISED, is_cut, is_marked, mark, read_object, scratch_name
from qlora_lab.files.replace import replace_bytes, replace_text, replacing_file
from qlora_lab.files.tensor_file import save_tensors
from qlora_lab.model.empty_model import empty_model, fields_of, stored_options
from qlora_lab.model.experts import is_stack, stacks_of
from qlora_lab.model.fetch import resolve
from qlora_lab.model.language_model import as_names
from qlora_lab.model.layer_kinds import is_conv1d, out_and_in
from qlora_lab.model.linear4bit import HEAD, head_path
from qlora_lab.model.load import layer_sizes
from qlora_lab.model.model_files import CONFIG, INDEX, PROCESSOR_FILES, TOKENIZER_FILES, ModelError
from qlora_lab.model.packed_module import packed_tensors_of
from qlora_lab.model.quantised import options_of, quantised
from qlora_lab.model.share_in_4_bits import Share, in_4_bits
from qlora_lab.model.stored import Stored, files_of, opened, stored_tensors
from qlora_lab.quant.blocks import check_block_size
from qlora_lab.quant.codebook import codebook as named_codebook
from qlora_lab.quant.plan import Candidate, Plan, as_plan
from qlora_lab.quant.serialize import BITSANDBYTES_READS, BITSANDBYTES_SMALLEST
from qlora_lab.quant.stack import STATE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECE = 2**30  # bytes of the original's tensors in a file: a quarter of it in memory, a few seconds of work
UNFINISHED = "quantizing.json"  # what an interrupted call was doing
PLAN = "plan.json"
OURS_ALONE = "not_for_bitsandbytes"  # in quantization_config: the reason
COPIED = ["generation_config.json", "source.json", *TOKENIZER_FILES, *PROCESSOR_FILES]


def quantize_folder(
    name_or_path: str | Path,
    out: str | Path,
    codebook: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    plan: Plan | str | Path | None = None,
    also: Iterable[str] = (),
    progress: bool = True,
) -> Path:
    """Write a quantised copy of a model to the folder `out`, or finish an interrupted one. Returns `out`.

    plan: a Plan or its file, instead of the options, for layers that differ (quant/plan.py). It is kept in the folder.
    also: parts of a model that sees to quantise beside its language model; see load.
    `read_by` says which tools read the folder.
    Raises what `load` raises, FileExistsError for a folder that holds anything else, BlockingIOError for one that
    another process writes to, and ValueError for an empty path, a folder inside the model's, one that was begun from
    another model or with other options, and a plan of another model.
    """
    also = as_names(also)
    out = out_folder(out)
    named_codebook(codebook)
    check_block_size(block_size)
    plan = as_plan(plan)
    check_apart(out, name_or_path)  # before a lock lies there
    with locked_folder(out, "quantize"):
        source = resolve(name_or_path, progress=progress)  # fetched if need be
        check_apart(out, source)  # what a name stands for
        share = _quantize(source, out, Candidate(codebook, block_size, double_quant), plan, also, progress)
    share.warn_if_small(stacklevel=2)
    return out


def _quantize(
    source: Path, out: Path, chosen: Candidate, plan: Plan | None, also: tuple[str, ...], progress: bool
) -> Share:
    if already := stored_options(source):
        raise ModelError(f"{source} is in 4 bits already, as {already}: load it, or quantise its original")
    model = empty_model(source, torch.float32)  # names and shapes alone
    stored = stored_tensors(model, source)
    options = options_of(model, chosen, plan, also)
    pieces = _pieces(stored)  # the same cut in each call, so an interrupted one can continue
    work = chosen._asdict() | {"pieces": pieces, "also": list(also)}
    work |= {"source": _identity(source, stored), "plan": plan and {name: list(o) for name, o in options.items()}}
    _begin(out, work)
    weight_map = {}  # key -> the file that holds it
    total = len(pieces)
    bar = tqdm(total=len(stored), desc="quantising", unit="tensor", disable=not progress)
    for number, piece in enumerate(pieces, 1):
        file = out / f"model-{number:05}-of-{total:05}.safetensors"
        if not file.exists():  # else an earlier call finished it: a file gets its name only when it is whole
            tensors = {}
            for name in piece:
                bar.set_postfix_str(name.removeprefix("model."), refresh=False)
                tensor = stored[name].read()
                if (layer := name.removesuffix(".weight")) in options:
                    tensors |= packed_tensors_of(quantised(model, layer, tensor, options[layer]), name)
                else:
                    tensors[name] = tensor.clone()  # a view would keep the file mapped
                bar.update()
            with replacing_file(file) as new:
                # All weights share a table, but safetensors stores no tensor under two names: each gets a copy.
                tables = {key: value.clone() for key, value in tensors.items() if key.endswith("quant_map")}
                save_tensors(tensors | tables, new, {"format": "pt"})
                disk.copy_mode(out / UNFINISHED, new)  # safetensors lets only the owner read its files
        else:
            bar.update(len(piece))
        with opened(file) as whole:
            weight_map |= dict.fromkeys(whole.keys(), file.name)  # opening it proves that it is whole
    bar.close()
    config = fields_of(source) | {"quantization_config": described(model, chosen, plan, options)}
    if has_own_head(model, stored):
        config["tie_word_embeddings"] = False
    _finish(out, source, config, plan, weight_map)
    return in_4_bits(model, options)


def read_by(folder: Path) -> str:
    """Say which tools read a folder that quantize_folder wrote, and why bitsandbytes does not, if so."""
    reason = fields_of(folder)["quantization_config"].get(OURS_ALONE)
    return f"QLoRA Lab alone: {reason}" if reason else "QLoRA Lab, and transformers with bitsandbytes"


def folder_in_4_bits(folder: Path) -> Share:
    model = empty_model(folder, torch.float32)
    stored = files_of(folder)  # experts may lie there in 16 bits, as other tools leave them
    return in_4_bits(model, [*layer_sizes(model), *(path for path in stacks_of(model) if f"{path}.{STATE}" in stored)])


def _pieces(tensors: dict[str, Stored]) -> list[list[str]]:
    sizes = {}
    for name, stored in tensors.items():
        with opened(stored.file) as file:
            dtype = file.get_slice(next(iter(stored.files))).get_dtype()
        sizes[name] = stored.shape.numel() * (4 if dtype == "F32" else 2)
    return pieces(sizes)


def pieces(sizes: dict[str, int]) -> list[list[str]]:
    """Cut names with their sizes in bytes, in their order, into lists of at most PIECE bytes, one for each file."""
    lists: list[list[str]] = []
    room = 0  # bytes left in the last one
    for name, nbytes in sizes.items():
        if not lists or nbytes > room:
            lists.append([])
            room = PIECE
        lists[-1].append(name)
        room -= nbytes  # may be negative: a tensor larger than PIECE has a file of its own
    return lists


def _identity(source: Path, tensors: dict[str, Stored]) -> dict:
    """Return what tells one source from another without reading all of it: sizes and times."""
    files = sorted({file for stored in tensors.values() for file in stored.files.values()})
    stats = {file.name: file.stat() for file in files}
    return {"folder": str(source.resolve()), "files": {n: [s.st_size, s.st_mtime_ns] for n, s in stats.items()}}


def _kept(model: nn.Module, layers: Collection[str]) -> list[str]:
    """Return paths of the head and of layers that are not packed, though bitsandbytes would expect it."""
    head = head_path(model) or HEAD
    linears = (path for path, module in model.named_modules() if _is_bitsandbytes(module))
    return [head, *(path for path in linears if path != head and path not in layers)]


def _is_bitsandbytes(module: nn.Module) -> bool:
    """Tell whether transformers lets bitsandbytes pack a layer of this kind: no subclass of nn.Linear, as Falcon's."""
    return type(module) is nn.Linear or is_conv1d(module)


def described(model: nn.Module, options: Candidate, plan: Plan | None, layers: Collection[str]) -> dict:
    """Return the quantization_config of a folder with these layers of `model` in 4 bits."""
    if stacks := [path for path in layers if is_stack(model, path)]:
        reason = f"bitsandbytes packs linear layers alone, and {stacks[0]} holds experts in one tensor"
    else:
        reason = _not_for_bitsandbytes(options, plan, {path: model.get_submodule(path) for path in layers})
    return _described(options, plan, _kept(model, layers), reason)


def _not_for_bitsandbytes(options: Candidate, plan: Plan | None, layers: dict[str, nn.Module]) -> str | None:
    """Return why bitsandbytes 0.50 cannot read the folder; None if it can. layers: those in 4 bits."""
    if plan:
        return "layers differ in data type or block size, and bitsandbytes knows one of each for a model"
    if options.codebook not in BITSANDBYTES_READS:
        return f"bitsandbytes knows {' and '.join(BITSANDBYTES_READS)}, but not {options.codebook}"
    size = options.block_size
    if size < BITSANDBYTES_SMALLEST:
        return f"bitsandbytes reads blocks of at least {BITSANDBYTES_SMALLEST} weights, not of {size}"
    for path, layer in layers.items():
        if not _is_bitsandbytes(layer):
            return f"bitsandbytes packs nn.Linear and Conv1D alone, not {type(layer).__name__} ({path})"
        row = out_and_in(layer)[1]  # weights in a row
        if row % size:  # on the CPU it decodes other weights in training, and fails in inference
            return f"blocks of {size} weights cross rows of {row} ({path}), which bitsandbytes misreads on a CPU"
    return None


def _described(options: Candidate, plan: Plan | None, kept: list[str], reason: str | None) -> dict:
    """Return the quantization_config. reason: why bitsandbytes cannot read the folder."""
    same = {
        "bnb_4bit_quant_type": options.codebook,
        "bnb_4bit_use_double_quant": options.double_quant,
        "block_size": options.block_size,
    }
    theirs = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    # Without load_in_4bit, by which transformers takes a folder for bitsandbytes' whatever its quant_method is.
    ours = {"quant_method": "qlora_lab", OURS_ALONE: reason}
    compute = {"bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": kept}
    return (ours if reason else theirs) | compute | ({"plan": PLAN} if plan else same)


def files_beside(folder: Path) -> list[str]:
    """Return the names, with slashes, of the files that a copy of a model takes over as they are."""
    paths = (path for pattern in COPIED for path in sorted(folder.glob(pattern)))
    return [path.relative_to(folder).as_posix() for path in paths if path.exists()]


def has_own_head(model: "PreTrainedModel", names: Collection[str]) -> bool:
    """Tell whether two weights that the configuration ties are both among the names of those that are stored."""
    ties = model.get_expanded_tied_weights_keys().items()  # by the configuration, whatever stored.py has untied
    return any(target in names and source in names for target, source in ties)


def _begin(out: Path, work: dict) -> None:
    if (out / CONFIG).exists() and not (out / UNFINISHED).exists():
        raise FileExistsError(f"{out} holds a model already: choose another folder")
    if (out / UNFINISHED).exists():
        begun = {"also": []} | read_object(out / UNFINISHED)  # as versions without it began
        if not begun.keys() >= work.keys():
            raise FileExistsError(f"{out / UNFINISHED} is damaged, or another program's: choose another folder")
        if differing := [name for name in work if begun.get(name) != work[name]]:
            name = differing[-1]
            raise ValueError(f"{out} was begun with another {name}: repeat that call, or choose another folder")
        _clear(out)
        return
    ours = is_marked(out, QUANTISED) or is_cut(out, QUANTISED)
    begun_empty = {MARK, scratch_name(out)} if ours else set()  # all that a call killed at once leaves
    if {path.name for path in out.iterdir()} - begun_empty - {LOCK}:
        raise FileExistsError(f"{out} is not empty: choose another folder")
    _clear(out)
    replace_text(out / UNFINISHED, json.dumps(work) + "\n")


def _clear(out: Path) -> None:
    """Mark the folder, and remove the scratch of a process that was killed while writing."""
    disk.remove_if_possible(out / mark(out, QUANTISED))


def _finish(out: Path, source: Path, config: dict, plan: Plan | None, weight_map: dict[str, str]) -> None:
    """Write all small files; config.json, which makes the folder a model, comes last. config: its fields."""
    size = sum((out / name).stat().st_size for name in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    if plan:
        plan.save(out / PLAN)
    copied = files_beside(source)
    for name in copied:
        disk.make_folder((out / name).parent)
        with replacing_file(out / name) as new:
            disk.copy(source / name, new)
    files = {INDEX: index, CONFIG: config}
    contents = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}
    replace_sums(out, [*set(weight_map.values()), *copied, *([PLAN] if plan else [])], contents)
    for name, content in contents.items():
        replace_bytes(out / name, content)
    disk.remove_if_possible(out / scratch_name(out))
    for name in (MARK, UNFINISHED):  # without UNFINISHED the folder is a finished model
        disk.remove(out / name)
