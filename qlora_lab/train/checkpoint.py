"""Checkpoints: the whole state of a run on disk, so that a killed run continues as an uninterrupted one would.

In: tensors by name, and facts that JSON can hold. Out: one folder per step,
    checkpoints/step-00000040/   state.safetensors   state.json   best/   SHA256SUMS (`sha256sum -c` reads it)
Source: what users of other trainers lost: resumes without the optimizer, and files cut off by a full disk.

A checkpoint is written under another name, flushed to the disk and renamed, so a folder with its final name is whole.
Checksums find damage that comes later; a damaged checkpoint is refused, with the name of the file.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qlora_lab.files import disk
from qlora_lab.files.checksums import as_lines, read_sums, sha256
from qlora_lab.files.replace import replacing_folder, scratch_for
from qlora_lab.files.strict_json import read_json
from qlora_lab.files.tensor_file import save_tensors

FOLDER = "checkpoints"
TENSORS = "state.safetensors"  # adapter and optimizer
FACTS = "state.json"  # everything else
SUMS = "SHA256SUMS"  # of all the other files
BEST = "best"  # the adapter with the lowest held-out loss, if there was an evaluation
CHECKPOINT_FILES = (TENSORS, FACTS, SUMS, BEST)


def saved_steps(run: Path) -> list[int]:
    """The steps with a checkpoint in the folder `run`, ascending."""
    return sorted(int(folder.name.removeprefix("step-")) for folder in step_folders(run))


def step_folders(run: Path) -> list[Path]:
    """The folders with names of checkpoints. Anything else beside them belongs to the user."""
    return [path for path in (run / FOLDER).glob("step-*") if re.fullmatch(r"step-[0-9]{8,}", path.name)]


def state_file(run: Path, step: int, name: str) -> Path:
    """The file `name`, such as FACTS, of the checkpoint of `step`."""
    return _folder(run, step) / name


def save_checkpoint(
    run: Path, step: int, tensors: dict[str, torch.Tensor], facts: dict, keep: int, best: Path | None = None
) -> Path:
    """Write the state after `step`, then remove all checkpoints but the newest `keep`. Returns its folder.

    best: a folder to copy along, the adapter with the lowest held-out loss so far.
    Raises OSError if the state cannot be written, and says what is left; earlier checkpoints do not change.
    """
    target = _folder(run, step)
    disk.make_folder(target.parent)
    disk.sync(run)  # a power cut must not lose the name of the new folder
    try:
        with replacing_folder(target, owner=run) as new:
            save_tensors(tensors, new / TENSORS)
            disk.copy_mode(run, new)
            disk.write_text(new / FACTS, json.dumps(facts, indent=2, allow_nan=False) + "\n")
            disk.copy_mode(new / FACTS, new / TENSORS)  # safetensors writes files that only their owner can read
            if best:
                disk.copy_folder(best, new / BEST)
            files = sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file())
            disk.write_bytes(new / SUMS, as_lines({name: sha256(new / name) for name in files}))
    except OSError as error:
        size = sum(tensor.nbytes for tensor in tensors.values()) / 2**20  # MiB
        kept = saved_steps(run)
        left = f"the checkpoint of step {kept[-1]} is whole" if kept else "there is no earlier checkpoint"
        raise OSError(
            f"step {step} could not be saved in {run} ({error}); {left}. Free {size:,.0f} MiB there, then resume"
        ) from error
    forget(run, saved_steps(run)[:-keep])
    return target


def forget(run: Path, steps: list[int]) -> None:
    """Remove the checkpoints of `steps`. Each is renamed first: a folder with its final name is always whole."""
    for step in steps:
        with scratch_for(_folder(run, step), owner=run) as scratch:
            disk.rename(_folder(run, step), scratch / "old")


def load_checkpoint(run: Path, step: int) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and facts of the state after `step`.

    Raises FileNotFoundError if there is none, and ValueError, with the file, if it changed since it was written.
    """
    folder = _folder(run, step)
    steps = saved_steps(run)
    if step not in steps:
        there = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
        raise FileNotFoundError(f"{run} has no checkpoint of step {step}: {there}")
    if damaged := _damaged(folder):
        earlier = [s for s in steps if s < step]
        remedy = f"resume from the checkpoint before it: resume={earlier[-1]}" if earlier else "no earlier one is left"
        raise ValueError(f"{folder / damaged} was cut off or changed after it was written; {remedy}")
    try:
        # copies: what load_file returns are views of the file
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} holds no tensors ({error}): resume from another checkpoint") from None
    return tensors, read_json(folder / FACTS)


def restore_best(run: Path, step: int, best: Path) -> None:
    """Make the folder `best` what it was when `step` was saved; remove it if there was none."""
    stored = _folder(run, step) / BEST
    if stored.is_dir():
        with replacing_folder(best) as new:
            disk.copy_folder(stored, new)
    elif best.exists():
        with scratch_for(best.resolve(), owner=best.parent) as scratch:
            disk.rename(best.resolve(), scratch / "old")


def _damaged(folder: Path) -> str | None:
    """The first file whose checksum differs; None if all files are whole."""
    try:
        sums = read_sums(folder / SUMS)
    except ValueError:
        return SUMS
    if not {TENSORS, FACTS} <= sums.keys():  # a list that was cut off would vouch for too little
        return SUMS
    wrong = (n for n, digest in sums.items() if not (folder / n).is_file() or sha256(folder / n) != digest)
    return next(wrong, None)


def _folder(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08}"
