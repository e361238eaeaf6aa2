"""Train a small model that sees in full, by LoRA and by QLoRA, then quantise it part by part: what breaks first?

    python bench/multimodal.py                     three seeds
    python bench/multimodal.py --seeds 1           the first seed alone
    python bench/multimodal.py --quick --out FILE  a few steps: to see that it runs

A seed draws its own pictures (toy-shapes), trains its own vision tower and projector, and from there on each method
learns the same questions in the same order. All are tested on pictures whose pairs of colour and shape, and of colour
and number, no training picture had. The language-only baseline is the same QLoRA run with empty pictures.

Every run is a process of its own, so its peak of memory is its own. Seconds are those of the processor, over all
threads: they bear other work beside them, within limits; elapsed seconds would not. A row is on the disk when its run
has ended, and a row that is there is not measured again, unless later runs need what it left and that is gone.

It has not run in full with these settings, so no figures are stored; LOG.md has those of fewer steps.
"""

import argparse
import datetime
import hashlib
import json
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tqdm.auto import tqdm  # noqa: E402

from bench.cpu import versions  # noqa: E402
from bench.files import write  # noqa: E402
from qlora_lab.data.shapes import ASKED, RECORDS, shapes_split, write_shapes  # noqa: E402
from qlora_lab.files.results_file import Kind, append_result, open_results, with_checksum  # noqa: E402
from qlora_lab.files.strict_json import NUMBER, OBJECT, TEXT  # noqa: E402

OUT = HERE / "multimodal.json"
PROJECTOR = "projector.safetensors"
MARK = "mark"  # a file that tells a folder from another that had its name
ROWS = Kind(
    "bench/multimodal.py",
    "the bench of models that see",
    {"settings": OBJECT, "seed": NUMBER, "run": TEXT, "mark": TEXT, "right": OBJECT},
    ("settings", "seed", "run"),
    first="settings",
)
METHODS = ("qlora", "lora", "full", "blind")
RATES = {"projector": 2e-3, "full": 1e-4, "lora": 1e-3, "qlora": 1e-3, "blind": 1e-3}
PARTS = ("vision_tower", "multi_modal_projector", "language_model")
CODEBOOKS = ("nf4", "nf3", "nf2")
RUNS = ("projector", *METHODS, "damage")


@dataclass(frozen=True)
class Settings:
    """What decides the figures."""

    pictures: int = 3840  # for the tower
    tower_steps: int = 400
    batch: int = 16  # questions in a step
    projector_steps: int = 100
    language_steps: int = 100
    test: int = 48  # pictures, each with four questions
    r: int = 16
    alpha: int = 32


# ---------------------------------------------------------------------------------------------- one run, in its process


def child(folder: Path, settings: Settings, seed: int, run: str) -> dict:
    """Make one run and return what it measured. Each reads what those before it left in the folder of its seed."""
    import torch

    import qlora_lab as ql
    from qlora_lab.memory.measured import peak_resident, reset_peak, resident

    torch.manual_seed(seed)
    split = shapes_split(settings.pictures, settings.test, seed=seed)
    if run == "projector":
        build(folder, settings, seed, split)
    empty = resident()  # Python and its libraries
    model, tokenizer = loaded(folder, run)
    if run == "projector":
        as_large_as_words(model, split.train[: settings.batch])
    row = {"weight_bytes": weight_bytes(model)}
    ask = partial(right, model, tokenizer, split.test, run == "blind")
    if run == "damage":
        ql.load_adapter(model, folder / "runs" / "lora" / "adapter")
        return row | {"right": ask(), "damaged": damaged(model, ask)}
    reset_peak()
    row |= trained(model, tokenizer, folder, settings, seed, run)
    row["peak_bytes"] = peak_resident() - empty
    return row | {"right": ask()}


def build(folder: Path, settings: Settings, seed: int, split) -> None:
    """Train the tower, and write the model and the questions of both stages."""
    from qlora_lab.train.toy_llava import toy_llava, trained_tower

    tower = trained_tower(split.train, settings.tower_steps, seed=seed, progress=False)
    toy_llava(folder / "model", tower, seed=seed, progress=False)
    first = settings.batch * settings.projector_steps
    second = first + settings.batch * settings.language_steps
    write_shapes(folder / "projector", split.train[:first])
    write_shapes(folder / "language", split.train[first:second])
    write_shapes(folder / "blind", split.train[first:second], blank=True)


def loaded(folder: Path, run: str):
    """Load the model for a run; after the first stage with the projector that it has trained."""
    import torch
    from safetensors.torch import load_file

    import qlora_lab as ql

    codebook = "nf4" if run in ("qlora", "blind") else None
    model, tokenizer = ql.load(folder / "model", codebook, dtype=torch.bfloat16, device="cpu", progress=False)
    if run != "projector":
        projector = load_file(folder / PROJECTOR)
        model.get_submodule(f"model.{PARTS[1]}").load_state_dict(projector)
    return model, tokenizer


def as_large_as_words(model, scenes) -> None:
    """Scale a new projector so that its tokens are as large as those of words.

    Drawn as usual they are three times as large, and gradients of norm 300 took 20 of 60 steps of a run (LOG.md).
    """
    import torch

    from qlora_lab.train.toy_llava import pixels

    tower, projector = (model.get_submodule(f"model.{part}") for part in PARTS[:2])
    with torch.no_grad():
        patches = tower(pixels(scenes).to(model.dtype)).last_hidden_state[:, 1:]  # (scenes, 9, 128)
        ratio = model.get_input_embeddings().weight.float().std() / projector(patches).float().std()
        for tensor in projector.linear_2.parameters():
            tensor.mul_(ratio)


def trained(model, tokenizer, folder: Path, settings: Settings, seed: int, run: str) -> dict:
    """Train what the run trains, and keep what later runs need."""
    from safetensors.torch import save_file

    import qlora_lab as ql
    from qlora_lab.adapters.adapter import learned

    if run in ("qlora", "lora", "blind"):
        ql.add_lora(model, r=settings.r, alpha=settings.alpha, seed=seed)
    else:
        part = PARTS[1] if run == "projector" else PARTS[2]
        ql.add_adapter(model, "full", parts=part)
    first = run == "projector"
    data = folder / (run if run in ("projector", "blind") else "language") / RECORDS
    done = ql.finetune(
        model,
        tokenizer,
        data,
        settings.projector_steps if first else settings.language_steps,
        folder / "runs" / run,
        batch_size=settings.batch,
        lr=RATES[run],
        schedule="cosine",
        warmup_steps=min(5, settings.language_steps - 1),
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


def damaged(model, ask) -> dict[str, dict]:
    """Round one part of a model that was trained in 16 bits, ask, and put the part back; part by part."""
    from qlora_lab.train.toy_llava import rounded

    answers = {}
    for name in PARTS:
        part = getattr(model.model, name)
        for codebook in CODEBOOKS:
            setattr(model.model, name, rounded(part, codebook))
            answers[f"{name} in {codebook}"] = ask()
        setattr(model.model, name, part)
    return answers


def weight_bytes(model) -> int:
    """Bytes of all weights, packed ones with their constants; a tied head counts once."""
    from qlora_lab.adapters.model_tensors import model_tensors

    return sum({id(tensor): tensor.nbytes for _, tensor in model_tensors(model)}.values())


def right(model, tokenizer, scenes, blank: bool) -> dict[str, list[int]]:
    """Return for each property which of the scenes got the right answer, as 0 or 1."""
    from qlora_lab.train.seeing import see

    return {a: see(model, tokenizer, scenes, a, blank=blank, progress=False).right.int().tolist() for a in ASKED}


# ------------------------------------------------------------------------------------------------------------- all runs


def rows_of(results: Path, work: Path, settings: Settings, seeds: int, runs: tuple[str, ...]) -> list[dict]:
    """Return a row for each seed and run; make those that `results` lacks. The first run makes the seed's folder."""
    decides = asdict(settings) | {"rates": RATES}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    rows = []
    with open_results(results, ROWS) as (stored, file), tqdm(total=seeds * len(runs), desc="runs", unit="run") as bar:
        # Of several rows for one run, the last counts: it was made because what the others left was gone.
        done = {(row["seed"], row["run"]): row for row in stored if row["settings"] == decides}
        for seed in range(seeds):
            folder = work / f"{digest}-seed-{seed}"
            own = usable([done.get((seed, run)) for run in runs], folder)
            bar.update(len(own))
            for run in runs[len(own) :]:
                bar.set_postfix_str(f"seed {seed}, {run}")
                measured = in_process(folder, settings, seed, run)
                mark = own[0]["mark"] if own else secrets.token_hex(8)
                (folder / MARK).write_text(mark, "utf-8")
                row = {"settings": decides, "seed": seed, "run": run, "mark": mark, **measured}
                own.append(with_checksum(row | {"date": datetime.date.today().isoformat()}))
                append_result(file, own[-1])
                bar.update()
            rows += own
    return rows


def usable(rows: list[dict | None], folder: Path) -> list[dict]:
    """Return the first rows of a seed, those that need not be made again.

    Each run reads what those before it left. So the rows must come from one folder, and it must still be there if a
    row is missing.
    """
    mark = rows[0] and rows[0]["mark"]
    own = list(takewhile(lambda row: row and row["mark"] == mark, rows))
    there = (folder / MARK).is_file() and (folder / MARK).read_text("utf-8") == mark
    return own if there or len(own) == len(rows) else []


def in_process(folder: Path, settings: Settings, seed: int, run: str) -> dict:
    """Make one run in a process of its own. A first run begins with an empty folder."""
    if run == "projector" and folder.exists():
        shutil.rmtree(folder)
    asked = json.dumps([str(folder), asdict(settings), seed, run])
    made = subprocess.run([sys.executable, __file__, "--child", asked], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(made.stdout.splitlines()[-1])


def table(rows: list[dict]) -> str:
    lines = []
    for run in dict.fromkeys(row["run"] for row in rows):
        means = ", ".join(f"{accuracy(row['right']):.3f}" for row in rows if row["run"] == run)
        seconds = [round(row["cost"]["processor_seconds"], 1) for row in rows if row["run"] == run and "cost" in row]
        lines.append(f"{run:34} {means}  {seconds or ''}")
    for row in rows:
        lines += [f"seed {row['seed']}, {name}: {accuracy(r):.3f}" for name, r in row.get("damaged", {}).items()]
    return "\n".join(lines)


def accuracy(right: dict[str, list[int]]) -> float:
    return sum(map(sum, right.values())) / sum(map(len, right.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--quick", action="store_true", help="two steps of each kind")
    parser.add_argument("--out", type=Path, default=OUT, help="default: bench/multimodal.json")
    work = Path(tempfile.gettempdir()) / "qlora-lab" / "multimodal"
    parser.add_argument("--work", type=Path, default=work, help=f"models and rows of a stopped bench; default: {work}")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, settings, seed, run = json.loads(args.child)
        print(json.dumps(child(Path(folder), Settings(**settings), seed, run)))
        return
    if args.quick and args.out == OUT:
        parser.error("--quick needs --out: its figures mean nothing")
    settings = Settings(64, 2, 2, 2, 2, 4) if args.quick else Settings()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = rows_of(args.work / "rows.jsonl", args.work, settings, args.seeds, RUNS)
    result = {"settings": asdict(settings), "rates": RATES, "versions": versions(), "rows": rows}
    write(args.out, json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
