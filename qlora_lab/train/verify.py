"""Check by checksums whether a folder still holds what was written to it.

In: a run's folder, an adapter, a quantised folder, a fetched model. Out: a Part for each thing in it.
Nothing is written, and the user's own files in the folder are not looked at.
"""

from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from qlora_lab.files.checksums import (
    DIFFERS,
    MISSING,
    OK,
    RISING,
    SUMS,
    UNKNOWN,
    Part,
    digest_like,
    log_sha256,
    read_sums,
)
from qlora_lab.files.out_path import out_path
from qlora_lab.files.ownership import RUN, is_marked
from qlora_lab.files.strict_json import TEXT, read_json
from qlora_lab.model.hub_checksums import hub_files
from qlora_lab.model.quantized_folder import UNFINISHED
from qlora_lab.train.checkpoint import FACTS, FOLDER, SUMS as CHECKPOINT_SUMS, saved_steps, state_file, step_folders
from qlora_lab.train.run_folder import ADAPTER, BEST, LOG, RECORD, RESULT


def verify(folder: str | Path, progress: bool = True) -> list[Part]:
    """Compare each file of `folder` with its checksum. Returns a Part for each, in the order of their names.

    Raises FileNotFoundError if there is no folder, ValueError if nothing in it has a checksum, and OSError for a file
    that cannot be read.
    """
    folder = out_path(folder)
    if not folder.is_dir():
        made = "name one that a command of qlora-lab made; `qlora-lab fetch MODEL` shows where a model is"
        raise FileNotFoundError(f"{folder} is not a folder: {made}")
    if (folder / UNFINISHED).is_file():
        raise ValueError(f"{folder} is not finished, so it has no checksums yet: repeat the call of quantize")
    digests = {}  # name -> checksums, from one list or several
    states = {}
    for file in _lists(folder):
        place = file.parent.relative_to(folder)
        try:
            for name, digest in read_sums(file).items():
                digests.setdefault((place / name).as_posix(), set()).add(digest)
        except ValueError:  # the list itself is damaged
            states[(place / file.name).as_posix()] = DIFFERS
    for name, digest in hub_files(folder).items():
        digests.setdefault(name, set()).add(digest)
    states |= _compared(folder, digests, progress)  # reads every byte
    if is_marked(folder, RUN):
        states |= {name: state for name, state in _of_run(folder).items() if name not in states}
        # A complete run has a list that names its result; one that is lost or cut off vouches for too little.
        if (folder / RESULT).exists() and states[RESULT] == UNKNOWN:
            states[SUMS] = DIFFERS if (folder / SUMS).exists() else MISSING
    if set(states.values()) <= {UNKNOWN}:  # nothing was checked, which must not look like success
        raise ValueError(
            f"{folder} has no checksums: qlora-lab did not write it, or their list is lost: write the folder again"
        )
    return _parts(states)


def _lists(folder: Path) -> Iterator[Path]:
    steps = step_folders(folder) if is_marked(folder, RUN) else []
    files = [folder / SUMS, folder / ADAPTER / SUMS, folder / BEST / SUMS, *(step / CHECKPOINT_SUMS for step in steps)]
    return (file for file in files if file.exists())


def _compared(folder: Path, digests: dict[str, set[str]], progress: bool) -> dict[str, str]:
    """Name -> state of each file that has a checksum."""
    there = {name: wanted for name, wanted in digests.items() if (folder / name).is_file()}
    states = {name: DIFFERS if (folder / name).exists() else MISSING for name in digests if name not in there}
    size = sum((folder / name).stat().st_size for name in there)
    with tqdm(total=size, desc="checking", unit="B", unit_scale=True, delay=2, disable=not progress) as bar:
        for name, wanted in there.items():  # by two lists, or by ours and the hub's, which may be git's
            same = all(digest_like(digest, folder / name, bar.update) == digest for digest in wanted)
            states[name] = OK if same else DIFFERS
    return states


def _of_run(folder: Path) -> dict[str, str]:
    """Name -> state of the files that a run writes without a checksum beside them."""
    states = {name: UNKNOWN for name in (RECORD, RESULT) if (folder / name).exists()}
    without = [name for name in (ADAPTER, BEST) if (folder / name).is_dir() and not (folder / name / SUMS).exists()]
    states |= {f"{name}/": UNKNOWN for name in without}
    for step in step_folders(folder):
        if not (step / CHECKPOINT_SUMS).exists():
            states[(step / CHECKPOINT_SUMS).relative_to(folder).as_posix()] = MISSING
    if (folder / LOG).exists() or saved_steps(folder):
        states[LOG] = _state_of_log(folder)
    return states


def _state_of_log(folder: Path) -> str:
    """The state of the lines up to the newest checkpoint, which has their checksum."""
    if not (folder / LOG).is_file():
        return MISSING
    try:
        step = saved_steps(folder)[-1]
        expected = read_json(state_file(folder, step, FACTS), {"log_sha256": TEXT}, ("log_sha256",))["log_sha256"]
    except (IndexError, ValueError, FileNotFoundError):  # no checkpoint, or one that is damaged
        return UNKNOWN
    return OK if log_sha256(folder / LOG, step) == expected else DIFFERS


def _parts(states: dict[str, str]) -> list[Part]:
    """A part for each file at the top and each folder; a folder has the worst state of its files."""
    names: dict[str, list[str]] = {}
    for name in sorted(states):
        first, *rest = name.split("/")
        # checkpoints/step-00000050/ is a part of its own, adapter/ and best/ are one each
        part = "/".join([first, *rest[: int(first == FOLDER)], ""]) if rest else first
        names.setdefault(part, []).append(name)
    parts = []
    for part, files in names.items():
        worst = max((states[name] for name in files), key=RISING.index)
        parts.append(Part(part, worst, tuple(name for name in files if states[name] != OK)))
    return parts
