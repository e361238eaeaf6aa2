"""Train a small model that sees in full, by LoRA and by QLoRA, then quantise it part by part: what breaks first?

    python bench/multimodal.py                     three seeds: twenty minutes on two idle cores
    python bench/multimodal.py --seeds 1           the first seed alone
    python bench/multimodal.py --quick --out FILE  a few steps: to see that it runs

A seed draws its own pictures (toy-shapes), trains its own vision tower and projector, and from there on each method
learns the same questions in the same order. All are tested on pictures whose pairs of colour and shape, and of colour
and number, no training picture had. The language-only baseline is the same QLoRA run with empty pictures.

Every run is a process of its own, so its peak of memory is its own. Seconds are those of the processor, over all
threads: they bear other work beside them, within limits; elapsed seconds would not. A row is on the disk when its run
has ended, and a row that is there is not measured again. It writes multimodal.json, which notebook 14 shows.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tqdm.auto import tqdm  # noqa: E402

from bench.cpu import versions  # noqa: E402
from bench.files import write  # noqa: E402
from qlora_lab.data.shapes import ASKED, RECORDS, shapes_split, write_shapes  # noqa: E402
from qlora_lab.files.strict_json import NUMBER, OBJECT, TEXT  # noqa: E402
from qlora_lab.measure.results_file import Kind, append_result, identity, open_results, with_checksum  # noqa: E402

OUT = HERE / "multimodal.json"
PROJECTOR = "projector.safetensors"
ROWS = Kind(
    "bench/multimodal.py",
    "the bench of models that see",
    {"settings": OBJECT, "seed": NUMBER, "run": TEXT, "right": OBJECT},
    ("settings", "seed", "run"),
    first="settings",
)
METHODS = ("qlora", "lora", "full", "blind")
RATES = {"projector": 3e-3, "full": 1e-4, "lora": 1e-3, "qlora": 1e-3, "blind": 1e-3}
PARTS = ("vision_tower", "multi_modal_projector", "language_model")
CODEBOOKS = ("nf4", "nf3", "nf2")
RUNS = ("projector", *METHODS, "damage")


@dataclass(frozen=True)
class Settings:
    """What decides the figures."""

    pictures: int = 3840  # for the tower
    tower_steps: int = 400
    batch: int = 16  # questions in a step
    projector_steps: int = 60
    language_steps: int = 40
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
    row = {"weight_bytes": weight_bytes(model)}
    ask = partial(right, model, tokenizer, split.test, run == "blind")
    if run == "damage":
        ql.load_adapter(model, folder / "runs" / "lora" / "adapter")
        return row | {"right": ask(), "damaged": damaged(model, ask)}
    reset_peak()
    start = time.process_time()
    row |= trained(model, tokenizer, folder, settings, seed, run)
    row["processor_seconds"] = round(time.process_time() - start, 1)
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
    return {"learned": sum(p.numel() for p in learned(model).values()), "losses": losses}


def damaged(model, ask) -> dict[str, dict]:
    """Quantise one part of a model that was trained in 16 bits, ask, and put its weights back; part by part."""
    import torch
    from torch import nn

    import qlora_lab as ql

    answers = {}
    for part in PARTS:
        layers = [m for path, m in model.get_submodule(f"model.{part}").named_modules() if isinstance(m, nn.Linear)]
        for codebook in CODEBOOKS:
            kept = [layer.weight.data for layer in layers]
            for layer in layers:
                q = ql.quantize(layer.weight.data, codebook, double_quant=True)
                layer.weight.data = ql.dequantize(q, torch.bfloat16)
            answers[f"{part} in {codebook}"] = ask()
            for layer, weight in zip(layers, kept, strict=True):
                layer.weight.data = weight
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
    """Return a row for each seed and run; make those that `results` lacks."""
    wanted = [(seed, run) for seed in range(seeds) for run in runs]
    rows = []
    with open_results(results, ROWS) as (stored, file):
        done = {identity(row, ROWS): row for row in stored}
        bar = tqdm(wanted, "runs", unit="run")
        for seed, run in bar:
            bar.set_postfix_str(f"seed {seed}, {run}")
            row = {"settings": asdict(settings), "seed": seed, "run": run}
            if (same := identity(row | {"right": {}}, ROWS)) not in done:
                row |= in_process(work / f"seed-{seed}", settings, seed, run)
                row |= {"date": datetime.date.today().isoformat()}
                done[same] = with_checksum(row)
                append_result(file, done[same])
            rows.append(done[same])
    return rows


def in_process(folder: Path, settings: Settings, seed: int, run: str) -> dict:
    """Make one run in a process of its own. What an interrupted first run left is removed."""
    if run == "projector" and folder.exists():
        shutil.rmtree(folder)
    asked = json.dumps([str(folder), asdict(settings), seed, run])
    made = subprocess.run([sys.executable, __file__, "--child", asked], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(made.stdout.splitlines()[-1])


def table(rows: list[dict]) -> str:
    lines = []
    for run in dict.fromkeys(row["run"] for row in rows):
        means = ", ".join(f"{accuracy(row['right']):.3f}" for row in rows if row["run"] == run)
        seconds = [row["processor_seconds"] for row in rows if row["run"] == run and "processor_seconds" in row]
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
