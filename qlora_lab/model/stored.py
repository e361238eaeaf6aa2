"""Find the stored tensors that make each tensor of a model, by transformers' own rules for names.

Source: transformers' conversion_mapping and core_model_loading, which rename what older files store under other names,
and merge or split what they store in other pieces (Mixtral's experts: one by one in files, one tensor in the model).

A tied weight may be stored under any of its names; if two are stored and differ, they are two weights.
"""

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from qlora_lab.model.model_files import ModelError, weight_files
from qlora_lab.quant.finite import first_not_finite
from qlora_lab.quant.quantize import WEIGHT_DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

AGAIN = "take another copy of the model"


@dataclass(frozen=True)
class Rule:
    """How transformers makes tensors of the model from stored ones."""

    converter: "WeightConverter"
    patterns: tuple[str, ...]  # the one that each stored name matched, in their order
    first: str  # name of the first tensor that it makes
    model: "PreTrainedModel"

    def apply(self, parts: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Make tensors of the model from stored (name, tensor) in their order."""
        converter = deepcopy(self.converter)  # it collects tensors
        for pattern, (name, tensor) in zip(self.patterns, parts, strict=True):
            converter.add_tensor(self.first, name, pattern, tensor)  # grouped by pattern inside
        made = converter.convert(self.first, model=self.model, config=self.model.config)
        made = made[0] if isinstance(made, tuple) else made  # transformers 5.0 returns errors too
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor of the model in its files."""

    name: str
    shape: torch.Size
    files: dict[str, Path]  # stored name -> file; only one, unless there is a rule
    rule: Rule | None = None
    is_float: bool = True  # in the model

    @property
    def file(self) -> Path:
        return next(iter(self.files.values()))

    def read(self) -> torch.Tensor:
        """Read the tensor: without a rule a view of its file, which is opened anew, so dropping it frees its pages."""
        with opened_once(self.files) as files:
            parts = ((name, files[file].get_tensor(name)) for name, file in self.files.items())
            return self.checked(self.rule.apply(parts)[self.name] if self.rule else next(parts)[1])

    def checked(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor`, float64 as float32. Raises ModelError for a wrong shape, dtype or value."""
        check_shape(self.file, self.name, tensor.shape, self.shape)
        if not self.is_float:
            if tensor.is_floating_point() or tensor.is_complex():
                wrong = f"{self.name} is {tensor.dtype}, but the model has integers there"
                raise ModelError(f"{self.file}: {wrong}: {AGAIN}")
            return tensor
        if tensor.dtype not in (*WEIGHT_DTYPES, torch.float64):
            raise ModelError(
                f"{self.file}: {self.name} is {tensor.dtype}, but weights are float32, bfloat16 or float16: "
                "take a copy of the model in one of them"
            )
        tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
        if fault := first_not_finite(tensor):
            raise ModelError(f"{self.file}: {self.name} holds {fault}, but weights are finite: {AGAIN}")
        return tensor


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is cut off, or not safetensors ({error}): put a whole copy in its place") from None


@contextmanager
def opened_once(files: dict[str, Path]) -> Iterator[dict[Path, safe_open]]:
    """Open each file once: its header names all its tensors, thousands where experts are stored one by one."""
    with ExitStack() as stack:
        yield {path: stack.enter_context(opened(path)) for path in set(files.values())}


def check_shape(file: Path, name: str, shape: torch.Size, expected: torch.Size) -> None:
    """Raise ModelError for a tensor of another shape than the model's."""
    if shape != expected:
        raise ModelError(f"{file}: {name} has shape {tuple(shape)}, but config.json asks for {tuple(expected)}")


def files_of(folder: Path) -> dict[str, Path]:
    """Return tensor name -> the file that holds it, in the files' order."""
    files = {}
    for path in weight_files(folder):
        with opened(path) as stored:
            for name in stored.keys():  # noqa: SIM118  (not a dict: it has no __iter__)
                if files.setdefault(name, path) != path:
                    raise ModelError(f"{name} is in {files[name].name} and in {path.name}: keep one of the two files")
    return files


def stored_tensors(model: "PreTrainedModel", folder: Path, files: dict[str, Path] | None = None) -> dict[str, Stored]:
    """Return all that `model` reads, by its own names. Raises ModelError for missing or extra ones.

    files: stored name -> file; None: of an original, which stores each tensor under one name.
    """
    tensors = by_model_name(model, files or files_of(folder))
    check_names(folder, tensors, model)
    expected = model.state_dict().keys()  # parameters and saved buffers: what files hold
    return without_copies(model, {name: tensor for name, tensor in tensors.items() if name in expected})


def by_model_name(model: "PreTrainedModel", files: dict[str, Path]) -> dict[str, Stored]:
    """Return stored tensors by their names in the model; those without a place in it keep their stored names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    expected = model.state_dict()  # meta tensors: shapes and dtypes
    rules = get_model_conversion_mapping(model)  # the family's, from transformers
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]  # several tensors <-> one
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]  # old name -> new name
    by_name: dict[str, Stored] = {}
    converted: dict[str, list[tuple[str, str]]] = {}  # first name in the model -> (stored name, pattern)
    for name, file in files.items():
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and name in expected:  # a recent file, whose name no rule should change
            target = name
            pattern = None
        if pattern is not None and target in expected:
            converted.setdefault(target, []).append((name, pattern))
            continue
        if target in by_name:
            raise ModelError(f"{name} and {next(iter(by_name[target].files))} are both {target}: keep one of the two")
        own = expected.get(target)
        shape = torch.Size() if own is None else own.shape
        by_name[target] = Stored(target, shape, {name: file}, None, own is None or own.is_floating_point())
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    for target, parts in converted.items():
        parts.sort(key=lambda part: _natural(part[0]))  # files keep no order of experts
        rule = Rule(by_pattern[parts[0][1]], tuple(pattern for _, pattern in parts), target, model)
        by_name |= _made(rule, {name: files[name] for name, _ in parts}, expected)
    return by_name


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Return a key to sort by: experts.2 comes before experts.10, as transformers stacks them."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def _made(rule: Rule, files: dict[str, Path], expected: dict[str, torch.Tensor]) -> dict[str, Stored]:
    """Find out what `rule` makes of these files, with tensors that have shapes but no bytes."""
    with opened_once(files) as stored:
        sizes = {name: stored[file].get_slice(name).get_shape() for name, file in files.items()}
    parts = [(name, torch.empty(size, dtype=torch.float32, device="meta")) for name, size in sizes.items()]
    try:
        shapes = rule.apply(parts)
    except (RuntimeError, ValueError, IndexError) as error:
        names = f"{next(iter(files))} and {len(files) - 1} more"
        reason = str(error).split("\n")[0]
        raise ModelError(f"{names} cannot be put together as transformers does it: {reason}") from None
    return {name: Stored(name, expected.get(name, made).shape, files, rule) for name, made in shapes.items()}


def check_names(folder: Path, names: Iterable[str], model: "PreTrainedModel") -> None:
    """Raise ModelError unless `names` are all that `model` reads, and no others."""
    expected = set(model.state_dict())
    stored = set(names)
    missing = expected - stored - _tied_to(model, stored)
    missing = sorted(name for name in missing if not _matches(name, model._keys_to_ignore_on_load_missing))
    ignored = {r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"}  # old files hold them, and no model reads them
    ignored |= set(model._keys_to_ignore_on_load_unexpected or ())
    extra = sorted(name for name in stored - expected if not _matches(name, ignored))
    for names, what in ((missing, "missing from"), (extra, "not part of the model, but in")):
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise ModelError(f"{names[0]}{more}: {what} {folder}; config.json and weights do not belong together")


def _matches(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _tied_to(model: "PreTrainedModel", stored: set[str]) -> set[str]:
    """Return names of weights that are stored under another name, tied to theirs."""
    groups: dict[str, set[str]] = {}  # name -> all names of one weight
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    return set().union(*(group for group in groups.values() if group & stored))


def without_copies(model: "PreTrainedModel", tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Leave out tensors that are tied to an equal one. Untie, with a warning, those that differ."""
    kept = dict(tensors)  # the caller's stays
    for target, source in list(model.all_tied_weights_keys.items()):
        if not {target, source} <= kept.keys():
            continue
        if torch.equal(kept[target].read(), kept[source].read()):  # as views of their files
            del kept[target]
        else:
            del model.all_tied_weights_keys[target]
            message = f"{target} and {source} are tied by config.json, but differ in the files: they are two weights"
            warnings.warn(f"{message}; set tie_word_embeddings to false there", stacklevel=5)
    return kept
