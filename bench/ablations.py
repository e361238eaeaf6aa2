"""Train one model in many settings on the same batches, and record what each run learned.

    python bench/ablations.py                           SmolLM2-135M, every setting, three seeds: a night on two cores
    python bench/ablations.py --small --out FILE        the methods and the layers: at most 20 minutes on two cores
    python bench/ablations.py --group zoo layers        some groups of settings
    python bench/ablations.py --page                    renew docs/ablations.md from the rows, train nothing

A run is what `ql.finetune` does, and a row is on the disk when its run has ended. A run with the same model, data,
config, seed and versions as a row is not made again, so the same call continues a stopped one. Seed by seed, all
settings learn the same examples in the same order: the checksum of the examples that finetune notes must be the same.
Processes that share cores with others wait for their own threads: one thread each (OMP_NUM_THREADS=1) is then faster.
Settings and groups: ablation_settings.py. The page: ablation_page.py. Intervals: qlora_lab/measure/ablations.py.
"""

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

import qlora_lab as ql  # noqa: E402
from bench import ablation_page  # noqa: E402
from bench.ablation_settings import FIRST, GROUPS, SETTINGS, SMALL, Setting, seeds_of  # noqa: E402
from qlora_lab.adapters.adapter import learned  # noqa: E402
from qlora_lab.data.chat_template import ChatTemplate  # noqa: E402
from qlora_lab.data.dataset import encode_all  # noqa: E402
from qlora_lab.data.examples import Example  # noqa: E402
from qlora_lab.data.labels import encode_within  # noqa: E402
from qlora_lab.files.results_file import append_result, identity, open_results, with_checksum  # noqa: E402
from qlora_lab.measure.ablations import ABLATIONS  # noqa: E402
from qlora_lab.measure.held_out import generate_answers  # noqa: E402
from qlora_lab.measure.machine import machine  # noqa: E402
from qlora_lab.measure.rouge import rouge_l  # noqa: E402
from qlora_lab.measure.sweep import commit, model_record  # noqa: E402
from qlora_lab.model.empty_model import tokenizer_of  # noqa: E402
from qlora_lab.model.fetch import resolve  # noqa: E402
from qlora_lab.model.load import load  # noqa: E402
from qlora_lab.train.identity import base_checksum, installed_version  # noqa: E402
from qlora_lab.train.loop import shuffled  # noqa: E402
from qlora_lab.train.loss import held_out_loss  # noqa: E402
from qlora_lab.train.run_folder import RECORD  # noqa: E402
from qlora_lab.train.run_record import examples_checksum  # noqa: E402

OUT = HERE.parent / "data" / "ablations.jsonl"
MODEL = "smollm2-135m"
BATCH, LENGTH = 4, 96  # examples; tokens of the longest
TEST = 24  # held-out examples of at most LENGTH tokens
DTYPE = torch.bfloat16


@dataclass
class Base:
    """A model that no run has changed, and what it is worth without an adapter."""

    model: torch.nn.Module
    checksum: str
    loss: float
    rouge_l: float | None = None  # measured when a setting asks for it


@dataclass(frozen=True)
class Task:
    """What all runs learn, and what they are tested on."""

    tokenizer: object
    train: list[Example]
    test: list[Example]

    def encoded(self, examples: list[Example], needed: int | None = None) -> list:
        return encode_all(examples, self.tokenizer, LENGTH, needed, progress=False)[0]

    def loss(self, model: torch.nn.Module) -> float:
        return held_out_loss(model, self.encoded(self.test), False)

    def rouge_l(self, model: torch.nn.Module) -> float:
        answers = generate_answers(model, self.tokenizer, self.test, progress=False)
        scores = rouge_l(answers, [example.answer for example in self.test])
        return sum(scores) / len(scores)

    def record(self, seed: int, steps: int) -> dict:
        """Checksums of what a run with this seed learns and is tested on."""
        train = examples_checksum(self.encoded(shuffled(self.train, seed), steps * BATCH))
        test = examples_checksum(self.encoded(self.test))
        both = hashlib.sha256(f"{train} {test}".encode()).hexdigest()
        return {"name": "docstrings", "tokens_sha256": both, "train_sha256": train}


def read_task(tokenizer) -> Task:
    """Read the docstrings. Too long held-out examples are left out, so loss and ROUGE-L judge the same."""
    template = ChatTemplate(tokenizer)
    fitting = (e for e in ql.load_data("docstrings", "test") if not isinstance(encode_within(e, template, LENGTH), int))
    return Task(tokenizer, ql.load_data("docstrings"), list(itertools.islice(fitting, TEST)))


# ------------------------------------------------------------------------------------------------------------- one run


def read_base(model_name: str, setting: Setting, task: Task) -> Base:
    model = load(model_name, setting.codebook, double_quant=setting.double_quant, dtype=DTYPE, progress=False)[0]
    return Base(model, base_checksum(model), task.loss(model))


def run(base: Base, setting: Setting, seed: int, task: Task) -> dict:
    """Train one setting. The base is as before afterwards, unless the setting trains all of it."""
    start = time.perf_counter()
    model = base.model
    before = rouge_before(base, task) if setting.rouge else None
    ql.add_adapter(model, setting.method, seed=seed, progress=False, **setting.options)
    shared = {"batch_size": BATCH, "max_length": LENGTH, "save_every": 0, "progress": False}
    rates = {"lr": setting.lr, "lora_plus": setting.lora_plus}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        result = ql.finetune(model, task.tokenizer, task.train, setting.steps, out, seed=seed, **shared, **rates)
        train_sha256 = json.loads((out / RECORD).read_text("utf-8"))["data"]["sha256"]
    row = {
        "train_sha256": train_sha256,
        "losses": result.losses,
        "loss_before": base.loss,
        "loss_after": task.loss(model),
        "rouge_l_before": before,
        "rouge_l_after": task.rouge_l(model) if setting.rouge else None,
        "trainable": sum(parameter.numel() for parameter in learned(model).values()),
        "memory": memory(model, setting),
        "seconds": round(time.perf_counter() - start, 1),
    }
    if setting.method != "full":  # which leaves no base
        ql.remove_adapter(model)
        if base_checksum(model) != base.checksum:
            raise RuntimeError(f"the base is not what it was before {setting}")
    return row


def rouge_before(base: Base, task: Task) -> float:
    if base.rouge_l is None:
        base.rouge_l = task.rouge_l(base.model)
    return base.rouge_l


def memory(model: torch.nn.Module, setting: Setting) -> int:
    """The ledger's peak, in bytes."""
    method = setting.method
    if method in ("lora", "rslora", "loftq"):
        method = "qlora" if setting.codebook else "lora"
    options = {name: value for name, value in setting.options.items() if name != "alpha"}
    stored = {"codebook": setting.codebook, "double_quant": setting.double_quant} if setting.codebook else {}
    if method not in ("lora", "qlora", "full"):
        stored = {"codebook": "none"} | stored
    how = {"dtype": DTYPE, "device": model.device.type, "batch_size": BATCH, "length": LENGTH}
    return ql.predict_memory(model.config, method=method, **how, **stored, **options).peak


# ------------------------------------------------------------------------------------------------------------ all runs


def decided(name: str, setting: Setting, seed: int, task: Task, shared: dict) -> dict:
    """The part of a row that is known before its run."""
    config = asdict(setting) | {"batch_size": BATCH, "max_length": LENGTH, "test_examples": TEST}
    config |= {"dtype": str(DTYPE).removeprefix("torch."), "device": shared["device"]}
    data = task.record(seed, setting.steps)
    return {"model": shared["model"], "setting": name, "seed": seed, "config": config, "data": data} | shared["run"]


def record(model_name: str, work: list[tuple[str, Setting, int]], out: Path) -> None:
    """Make the runs of `work` that `out` has no row of: (name, setting, seed)."""
    tokenizer = tokenizer_of(resolve(model_name))
    task = read_task(tokenizer)
    shared = {"model": model_record(model_name, resolve(model_name))}
    shared["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {name: installed_version(name) for name in ("qlora-lab", "torch", "transformers")}
    shared["run"] = {"versions": versions, "commit": commit(), "machine": machine()}
    base, loaded = None, None  # loaded: which base it is
    with open_results(out, ABLATIONS) as (rows, file), tqdm(work, "ablations", unit="run") as bar:
        done = {identity(row, ABLATIONS) for row in rows}
        for name, setting, seed in bar:
            bar.set_postfix_str(f"{name}, seed {seed}")
            row = decided(name, setting, seed, task, shared)
            if identity(row, ABLATIONS) in done:
                continue
            if loaded != base_of(setting):
                base, loaded = None, base_of(setting)  # the memory of one is free before the next is read
                base = read_base(model_name, setting, task)
            found = run(base, setting, seed, task)
            if found.pop("train_sha256") != row["data"]["train_sha256"]:
                raise RuntimeError(f"in {name}, finetune read other examples than in the other settings")
            if setting.method == "full":
                base, loaded = None, None
            row |= found | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
            append_result(file, with_checksum(row))


def base_of(setting: Setting) -> tuple[str, bool, bool]:
    """What tells bases apart, and puts runs that leave no base behind the others."""
    return setting.codebook or "", setting.double_quant, setting.method == "full"


def in_order(work: list[tuple[str, Setting, int]]) -> list[tuple[str, Setting, int]]:
    """All settings with the first seed, then all with the next; within a seed, base by base. Without repeats."""
    return sorted({(name, seed): (name, setting, seed) for name, setting, seed in work}.values(), key=_turn)


def _turn(run: tuple[str, Setting, int]) -> tuple:
    _, setting, seed = run
    return seed, *base_of(setting)  # the sort is stable, so groups stay in their order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", nargs="+", choices=[*GROUPS], default=[*GROUPS], help="default: all")
    parser.add_argument("--small", action="store_true", help="each method once, and the layers; no answers")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each setting (default: 3)")
    parser.add_argument("--model", default=MODEL, help=f"a known name, a folder or a hub id (default: {MODEL})")
    parser.add_argument("--out", type=Path, default=OUT, help="default: data/ablations.jsonl")
    parser.add_argument("--page", action="store_true", help="renew docs/ablations.md from the rows, train nothing")
    args = parser.parse_args()
    if args.small and args.out == OUT:
        parser.error("--small needs --out: its settings have the names of longer ones")
    if args.model != MODEL and args.out == OUT:
        parser.error("--model needs --out: data/ablations.jsonl is of one model")
    if args.small:
        work = [(name, setting, FIRST + number) for name, setting in SMALL.items() for number in range(args.seeds)]
    else:
        groups = {name: group for group in args.group for name in GROUPS[group]}
        work = [(name, SETTINGS[name], seed) for name, group in groups.items() for seed in seeds_of(group, args.seeds)]
    if not args.page:
        try:
            record(args.model, in_order(work), args.out)
        except KeyboardInterrupt:  # in the middle of a run, of which nothing is kept
            sys.exit(f"stopped: {args.out} has the runs that ended, and the same call goes on from there")
    if args.out == OUT:
        ablation_page.renew()


if __name__ == "__main__":
    main()
