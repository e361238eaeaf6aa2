"""Everything that decided a run: what settings.json holds, and what a resume compares before it continues."""

import hashlib
import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch

from qlora_lab.adapters.adapter import Adapter, adapters
from qlora_lab.adapters.lora import linear_layers
from qlora_lab.data.chat_template import ChatTemplate
from qlora_lab.data.dataset import Encoded, EncodeReport
from qlora_lab.files.strict_json import TEXT, read_json
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.train.distributed import failing_together, from_process_0
from qlora_lab.train.identity import adopt_arithmetic, arithmetic, base_checksum
from qlora_lab.train.run_folder import RECORD
from qlora_lab.train.settings import FREE, Settings

NUMBER = ("steps", "batch_size")  # decide how many examples are encoded
CHOICE = ("max_length", "seed")  # decide which examples are encoded


def run_clock(folder: Path, tokenizer, resume: bool | int) -> datetime | None:
    """The time for a chat template that writes the date: now, or when the run in `folder` began.

    None if the template asks for no time, or if that of the run in `folder` asked for none.
    """
    if not ChatTemplate(tokenizer).is_dated:
        return None
    with failing_together():
        clock = datetime.now()  # local time, which chat templates write
        if resume is not False and (folder / RECORD).exists():
            clock = _stored_clock(folder / RECORD)
    return from_process_0(clock)


def _stored_clock(path: Path) -> datetime | None:
    try:
        stored = read_json(path, {"clock": TEXT}).get("clock")
        return datetime.fromisoformat(stored) if stored else None
    except ValueError as error:
        reason = str(error).removeprefix(str(path)).lstrip(", ")
        damaged = f"{path} is damaged ({reason}), so the time at which the run began is not known"
        raise ValueError(f"{damaged}: restore the file, or start a new run in another folder") from error


def record(
    model, settings: Settings, report: EncodeReport, encoded: list[Encoded], clock: datetime | None = None
) -> dict:
    """Everything that decided the run, as JSON can hold it."""
    layers = adapters(model)
    layer = next(iter(layers.values()))
    linear = linear_layers(model)
    base = next(linear[path] for path in (*layers, *linear) if path in linear)  # the first adapted, if one is linear
    data = asdict(report)  # counts of examples and tokens
    notes = data.pop("notes")  # beside the data: they decide nothing
    del data["skipped"]  # places and reasons decide nothing either
    dated = {"clock": clock.isoformat()} if clock else {}
    decided = {
        "model": getattr(model, "name_or_path", None),
        "base_sha256": base_checksum(model),  # the name alone does not tell whether the weights changed
        "dtype": str(computes_in(model)).removeprefix("torch."),
        "device": next(iter(layer.learned().values())).device.type,
        "weights": str(base.weight) if isinstance(base, Linear4bit) else "not quantised",
        "adapter": _settings(layers) | {"layers": len(layers)},
        "adapted": hashlib.sha256(" ".join(layers).encode()).hexdigest(),  # which layers have adapters
        "data": data | {"sha256": examples_checksum(encoded)},
        "notes": notes,
    }
    return asdict(settings) | dated | decided


def comparable(record: dict) -> dict:
    """The part of a record that a resumed run must have as well, as JSON would give it back."""
    return {name: value for name, value in json.loads(json.dumps(record)).items() if name not in FREE}


def check_same_run(folder: Path, saved: dict, record: dict, encoded: list[Encoded]) -> None:
    """Raise ValueError, with each difference, unless `record` and `encoded` are those of the saved run."""
    saved = {"lora_plus": Settings.lora_plus} | saved  # which runs of earlier versions do not name
    if lines := obstacles(comparable(saved), comparable(record), encoded):
        raise ValueError(
            f"{folder} holds a different run, so it cannot be resumed: {'; '.join(lines)}. "
            "Use the settings, model and data that it began with, or choose another folder"
        )


def adopt_saved(model: torch.nn.Module, saved: dict, folder: Path, other_arithmetic: bool) -> None:
    """Compute as the run did so far. Raises ValueError where that cannot be, unless `other_arithmetic` accepts it."""
    adopt_arithmetic(model, saved)  # first take over what can be chosen, then compare the rest
    lines = differences(saved, arithmetic(model) | {"race": saved["race"]})  # another winner was taken over
    if lines and not other_arithmetic:
        raise ValueError(
            f"{folder} began with different arithmetic, so its last bits would differ: {'; '.join(lines)}. "
            "To resume anyway, pass other_arithmetic=True (--other-arithmetic on the command line)"
        )


def obstacles(saved: dict, now: dict, encoded: list[Encoded]) -> list[str]:
    """What keeps a saved run from being resumed now: one line for each cause, none for its consequences.

    With another number of steps another number of examples is encoded; only the number of steps is then a cause. If it
    changes neither the examples nor the learning rate, it is no obstacle: a longer run would have made the same steps.
    """
    free = set()  # names that may differ
    if saved["data"] == now["data"] and saved["schedule"] == now["schedule"] == "constant":
        free.add("steps")
    if _data_follow(saved, now, encoded):
        free.add("data")
    return differences(*({n: value for n, value in record.items() if n not in free} for record in (saved, now)))


def _data_follow(saved: dict, now: dict, encoded: list[Encoded]) -> bool:
    """Whether a changed setting explains why other examples are encoded."""
    if any(saved[name] != now[name] for name in CHOICE):
        return True
    if all(saved[name] == now[name] for name in NUMBER):
        return False
    kept = saved["data"]["kept"]  # the order is the same, so fewer examples are the first of more
    return kept > len(encoded) or examples_checksum(encoded[:kept]) == saved["data"]["sha256"]


def examples_checksum(encoded: list[Encoded]) -> str:
    """SHA-256 over tokens, labels and pictures of all examples, in their order."""
    rows = [(e.input_ids, e.labels, *(picture.sha256 for picture in e.pictures)) for e in encoded]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def differences(saved: dict, now: dict, prefix: str = "") -> list[str]:
    """One line for each difference: "adapter.r: 16 in the checkpoint, 8 now"."""
    lines = []
    for name in dict.fromkeys([*saved, *now]):
        before = saved.get(name)
        after = now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: {before} in the checkpoint, {after} now")
    return lines


def computes_in(model: torch.nn.Module) -> torch.dtype:
    """The dtype in which the model computes, whatever dtype its 4-bit weights and adapters are stored in."""
    return getattr(model, "dtype", torch.float32)


def _settings(layers: dict[str, Adapter]) -> dict:
    """The method, unless it is LoRA, and its settings; where layers differ, a list with one value per layer."""
    first = next(iter(layers.values()))
    of_layers = [layer.settings() for layer in layers.values()]
    values = {name: [settings[name] for settings in of_layers] for name in first.settings()}
    shared = {name: all_[0] if len(set(all_)) == 1 else all_ for name, all_ in values.items()}
    return shared if first.method == "lora" else {"method": first.method} | shared
