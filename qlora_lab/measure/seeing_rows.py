"""Train a small model that sees in full, by LoRA and by QLoRA, then quantise it part by part: what breaks first?

In: seeds. Out: a row for each seed and run in a JSONL file (results_file.py): which questions were answered rightly,
weights and peak in bytes, losses, and what the steps cost.

    tower -> "projector" -> "qlora", "lora", "full", "blind" -> "damage"

A seed draws its own pictures (toy-shapes), trains its own vision tower and projector, and from there on each method
learns the same questions in the same order. All are tested on combinations of colour, shape and number that no training
picture had. "blind", the language-only baseline, is QLoRA with empty pictures. "damage" rounds one part of the model
that "lora" has made, then the next.

Every run is a process of its own, so its peak of memory is its own. Seconds are those of the processor, over all
threads: they bear other work beside them, within limits; elapsed seconds would not.
Source of the question: LLaVA at scale (arXiv 2309.09958), section 3: full, LoRA and QLoRA are about equally good.
"""

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from qlora_lab.adapters.adapter import learned
from qlora_lab.adapters.add_adapter import add_adapter
from qlora_lab.adapters.lora import add_lora
from qlora_lab.adapters.model_tensors import model_tensors
from qlora_lab.adapters.peft_format import load_adapter
from qlora_lab.data.shapes import ASKED, RECORDS, shapes_split, write_shapes
from qlora_lab.files import disk
from qlora_lab.files.out_path import out_path
from qlora_lab.files.results_file import Kind, append_result, open_results, with_checksum
from qlora_lab.files.strict_json import NUMBER, OBJECT, TEXT, parse
from qlora_lab.measure.machine import machine
from qlora_lab.measure.sweep import commit
from qlora_lab.model.load import load
from qlora_lab.quant.numbers import check_whole
from qlora_lab.train.identity import installed_version
from qlora_lab.train.resident import peak_resident, reset_peak, resident
from qlora_lab.train.seeing import see
from qlora_lab.train.toy_llava import rounded, toy_llava, trained_tower
from qlora_lab.train.trainer import finetune

PROJECTOR = "projector.safetensors"
MARK = "mark"  # a file that tells a folder from another that had its name
RULES = dict.fromkeys(("settings", "versions", "machine", "right"), OBJECT)
RULES |= {"seed": NUMBER, "run": TEXT, "mark": TEXT}
DECISIVE = ("settings", "versions", "seed", "run")
ROWS = Kind("seeing_rows", "a comparison of models that see", RULES, DECISIVE, first="settings")
FILE = "rows.jsonl"
METHODS = ("qlora", "lora", "full", "blind")
RATES = {"projector": 1e-3, "full": 1e-4, "lora": 1e-3, "qlora": 1e-3, "blind": 1e-3}
PARTS = ("vision_tower", "multi_modal_projector", "language_model")
CODEBOOKS = ("nf4", "nf3", "nf2")
RUNS = ("projector", *METHODS, "damage")


@dataclass(frozen=True)
class Settings:
    """What decides the figures."""

    pictures: int = 3840  # for the tower
    tower_steps: int = 400
    batch: int = 8  # pictures in a step, each with four questions
    projector_steps: int = 20
    language_steps: int = 80
    test: int = 72  # pictures, each with four questions
    r: int = 16
    alpha: int = 32

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_whole(name, value)
        asked = self.batch * (self.projector_steps + self.language_steps)
        if asked > self.pictures:
            raise ValueError(f"the steps read {asked} pictures, but there are {self.pictures}: take more pictures")


def seeing_rows(
    work: str | Path,
    settings: Settings = Settings(),  # noqa: B008 - it is frozen
    seeds: int = 3,
    runs: Sequence[str] = RUNS,
    *,
    progress: bool = True,
) -> list[dict]:
    """Return a row for each of `seeds` and `runs`, in their order; make those that the folder `work` lacks.

    work: holds rows.jsonl, and the models that later runs of a stopped call need. runs: RUNS, or how it begins, for
    each reads what those before it have left. A row that is there is not made again, unless later runs need what it
    left and that is gone.
    A row has settings, versions, commit, machine, seed, run, mark (of the folder that it comes from), weight_bytes,
    right (property -> 0 or 1 for each picture), date, sha256; one of a training also learned (weights), losses, cost
    (train/cost.py) and peak_bytes, over Python and its libraries (None where the system does not tell); "damage" also
    damaged (each "part in codebook" -> as right).
    Raises ValueError for no seeds or other runs, RuntimeError for a run that failed, and whatever open_results raises.
    """
    check_whole("seeds", seeds)
    runs = tuple(runs)
    if not runs or runs != RUNS[: len(runs)]:
        raise ValueError(f"runs={runs!r:.80} is not allowed: give RUNS, {', '.join(RUNS)}, or how it begins")
    decides = asdict(settings) | {"rates": RATES}
    made_by = {name: installed_version(name) for name in ("qlora-lab", "torch", "transformers")}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    work = out_path(work)
    disk.make_folder(work)
    rows = []
    bar = tqdm(total=seeds * len(runs), desc="runs", unit="run", disable=not progress)
    with open_results(work / FILE, ROWS) as (stored, file), bar:
        # Of several rows for one run, the last counts: it was made because what the others left was gone.
        own_rows = (row for row in stored if (row["settings"], row["versions"]) == (decides, made_by))
        done = {(row["seed"], row["run"]): row for row in own_rows}
        for seed in range(seeds):
            folder = work / f"{digest}-seed-{seed}"
            own = _usable([done.get((seed, run)) for run in runs], folder)
            bar.update(len(own))
            for run in runs[len(own) :]:
                bar.set_postfix_str(f"seed {seed}, {run}")
                measured = _in_process(folder, settings, seed, run)
                mark = own[0]["mark"] if own else secrets.token_hex(8)
                disk.write_text(folder / MARK, mark)
                row = {"settings": decides, "versions": made_by, "commit": commit(), "machine": machine()}
                row |= {"seed": seed, "run": run, "mark": mark, **measured}
                own.append(with_checksum(row | {"date": datetime.now(UTC).date().isoformat()}))
                append_result(file, own[-1])
                bar.update()
            rows += own
    return rows


def _usable(rows: list[dict | None], folder: Path) -> list[dict]:
    """Return the first rows of a seed: those that need not be made again.

    Each run reads what those before it left. So the rows must come from one folder, and it must still be there if a
    row is missing.
    """
    mark = rows[0] and rows[0]["mark"]
    own = list(takewhile(lambda row: row and row["mark"] == mark, rows))
    there = own and (folder / MARK).is_file() and (folder / MARK).read_bytes() == mark.encode()
    return own if there or len(own) == len(rows) else []


def _in_process(folder: Path, settings: Settings, seed: int, run: str) -> dict:
    """Make one run in a process of its own. A first run begins with an empty folder."""
    if run == RUNS[0] and folder.exists():
        shutil.rmtree(folder)
    code, printed, said = _process(json.dumps([str(folder), asdict(settings), seed, run]))
    if code:
        last = f"it was killed by signal {-code}" if code < 0 else said.strip().splitlines()[-1]
        again = f"call again to go on from there, or remove {folder} to begin this seed anew"
        raise RuntimeError(f"the run {run!r} of seed {seed} failed: {last}. Mend what it names, and {again}")
    return parse(printed.splitlines()[-1], f"the row of {run!r}")


def _process(asked: str) -> tuple[int, str, str]:
    """Call one_run in a new process, which ends with this one; return its exit code, its output and its errors."""
    code = "import sys; from qlora_lab.measure.seeing_rows import one_run; one_run(sys.argv[1])"
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-c", code, asked]
        # Its input stays open as long as this process lives, whatever ends it. one_run watches that.
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=printed, stderr=said) as child:
            try:
                child.wait()
            finally:
                child.kill()
        for file in (printed, said):
            file.seek(0)
        return child.returncode, printed.read(), said.read()


def one_run(asked: str) -> None:
    """Make one run in this process, and print its row as the last line: `seeing_rows` calls it in a new process.

    Left alone by that one, it would go on writing into a folder that the next call has taken.
    """
    threading.Thread(target=_end_with_caller, daemon=True).start()
    folder, settings, seed, run = parse(asked, "the run")
    print(json.dumps(_measured(Path(folder), Settings(**settings), seed, run)))


def _end_with_caller() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _measured(folder: Path, settings: Settings, seed: int, run: str) -> dict:
    """Make one run and return what it measured. Each reads what those before it left in the folder of its seed."""
    torch.manual_seed(seed)
    split = shapes_split(settings.pictures, settings.test, seed=seed)
    if run == "projector":
        _build(folder, settings, seed, split)
    empty = resident()  # Python and its libraries
    model, tokenizer = _loaded(folder, run)
    row = {"weight_bytes": _weight_bytes(model)}
    ask = partial(_right, model, tokenizer, split.test, run == "blind")
    if run == "damage":
        load_adapter(model, folder / "runs" / "lora" / "adapter")
        return row | {"right": ask(), "damaged": _damaged(model, ask)}
    reset_peak()
    row |= _trained(model, tokenizer, folder, settings, seed, run)
    row["peak_bytes"] = None if empty is None else peak_resident() - empty
    return row | {"right": ask()}


def _build(folder: Path, settings: Settings, seed: int, split) -> None:
    """Train the tower, and write the model and the questions of both stages."""
    tower = trained_tower(split.train, settings.tower_steps, seed=seed, progress=False)
    toy_llava(folder / "model", tower, split.train, seed=seed, progress=False)
    first = settings.batch * settings.projector_steps
    second = first + settings.batch * settings.language_steps
    write_shapes(folder / "projector", split.train[:first])
    write_shapes(folder / "language", split.train[first:second])
    write_shapes(folder / "blind", split.train[first:second], blank=True)


def _loaded(folder: Path, run: str):
    """Load the model for a run; after the first stage with the projector that it has trained."""
    codebook = "nf4" if run in ("qlora", "blind") else None
    model, tokenizer = load(folder / "model", codebook, dtype=torch.bfloat16, device="cpu", progress=False)
    if run != "projector":
        projector = load_file(folder / PROJECTOR)
        model.get_submodule(f"model.{PARTS[1]}").load_state_dict(projector)
    return model, tokenizer


def _trained(model, tokenizer, folder: Path, settings: Settings, seed: int, run: str) -> dict:
    """Train what the run trains, and keep what later runs need."""
    if run in ("qlora", "lora", "blind"):
        add_lora(model, r=settings.r, alpha=settings.alpha, seed=seed)
    else:
        part = PARTS[1] if run == "projector" else PARTS[2]
        add_adapter(model, "full", parts=part)
    first = run == "projector"
    data = folder / (run if run in ("projector", "blind") else "language") / RECORDS
    steps = settings.projector_steps if first else settings.language_steps
    done = finetune(
        model,
        tokenizer,
        data,
        steps,
        folder / "runs" / run,
        batch_size=settings.batch,
        lr=RATES[run],
        schedule="cosine",
        warmup_steps=min(5, steps - 1),
        clip=1.0,
        max_length=64,
        save_every=0,
        seed=seed,
        overwrite=True,
        progress=False,
    )
    if first:
        save_file(model.get_submodule(f"model.{PARTS[1]}").state_dict(), folder / PROJECTOR)
    losses = [round(loss, 4) for loss in done.losses]
    return {"learned": sum(p.numel() for p in learned(model).values()), "losses": losses, "cost": asdict(done.cost)}


def _damaged(model, ask) -> dict[str, dict]:
    """Round one part of a model that was trained in 16 bits, ask, and put the part back; part by part."""
    answers = {}
    for name in PARTS:
        part = getattr(model.model, name)
        for codebook in CODEBOOKS:
            setattr(model.model, name, rounded(part, codebook))
            answers[f"{name} in {codebook}"] = ask()
        setattr(model.model, name, part)
    return answers


def _weight_bytes(model) -> int:
    """Bytes of all weights, packed ones with their constants; a tied head counts once."""
    return sum({id(tensor): tensor.nbytes for _, tensor in model_tensors(model)}.values())


def _right(model, tokenizer, scenes, blank: bool) -> dict[str, list[int]]:
    """Return for each property which of the scenes got the right answer, as 0 or 1."""
    return {a: see(model, tokenizer, scenes, a, blank=blank, progress=False).right.int().tolist() for a in ASKED}
