"""Time a batch whose eight rows use eight adapters beside one with a single adapter, and weigh a hundred adapters.

python bench/many_adapters.py                measure, write bench/many_adapters.json, renew docs/many_adapters.md
python bench/many_adapters.py --render       renew the page alone

In each round all run, one after the other, on one thread; a ratio is that of a round. Times are the processor's
seconds, because other work on the machine disturbs those least. Adapters: r = 16 on all linear layers, drawn at random.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from time import process_time

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

import qlora_lab as ql  # noqa: E402
from bench.files import between, write  # noqa: E402
from bench.timing import cpu_name  # noqa: E402
from qlora_lab.adapters.adapter import learned  # noqa: E402
from qlora_lab.adapters.many import AdapterBank  # noqa: E402
from qlora_lab.measure.latency import orders  # noqa: E402
from qlora_lab.train.resident import resident  # noqa: E402

OUT = HERE / "many_adapters.json"
PAGE = HERE.parent / "docs" / "many_adapters.md"
BEGIN, END = "<!-- made by bench/many_adapters.py -->", "<!-- end -->"
MODEL = "smollm2-135m"
ROWS = 8
RANK = 16
MANY, MANY_RANK = 100, 8
PROMPT, SHORT, NEW = 64, 8, 8  # tokens: of a prompt that is read; of one that is answered, and of its answer


def draw(model, folder: Path, number: int, r: int) -> Path:
    """Save a random adapter, as different from the base as a trained one."""
    ql.add_lora(model, r=r, seed=number)
    draws = torch.Generator().manual_seed(number)
    for name, parameter in learned(model).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.01, generator=draws)
    ql.save_adapter(model, folder)
    ql.remove_adapter(model)
    return folder


def tasks(model) -> dict[str, Callable[[], object]]:
    ids = torch.randint(1000, 2000, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return {
        f"read {ROWS} prompts of {PROMPT} tokens": lambda: model(ids),
        f"write {NEW} tokens to each of {ROWS} prompts": lambda: model.generate(ids[:, :SHORT], **how),
    }


def seconds(call: Callable[[], object]) -> float:
    start = process_time()
    with torch.no_grad():
        call()
    return process_time() - start


def half(bank: AdapterBank, names: list[str], call: Callable[[], object]) -> float:
    """Half as many adapters, each for two rows that do not lie side by side."""
    return mixed(bank, names[: ROWS // 2] * 2, call)


def one(bank: AdapterBank, names: list[str], call: Callable[[], object]) -> float:
    bank.use(names[0])
    return seconds(call)


def mixed(bank: AdapterBank, names: list[str], call: Callable[[], object]) -> float:
    with bank.rows(names):
        return seconds(call)


def entered(bank: AdapterBank, names: list[str]) -> float:
    def enter() -> None:
        with bank.rows(names):
            pass

    return seconds(enter)


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def cases(bank: AdapterBank, names: list[str], rounds: int) -> list[dict]:
    found = []
    for what, call in tasks(bank.model).items():
        contenders = {"one": one, "half": half, "eight": mixed}
        for run in contenders.values():  # kernels compile, buffers are made
            run(bank, names, call)
        times = {name: [] for name in contenders}
        for order in orders(contenders, rounds):
            for name in order:
                times[name].append(contenders[name](bank, names, call))
        case = {"what": what, "dtype": str(bank.model.dtype).removeprefix("torch.")}
        case["seconds"] = {name: spread(values) for name, values in times.items()}
        ratios = {name: [a / b for a, b in zip(times[name], times["one"], strict=True)] for name in ("half", "eight")}
        case["ratio"] = {name: spread(values) for name, values in ratios.items()}
        found.append(case)
        print(found[-1], flush=True)
    return found


def weigh(model, folder: Path) -> dict:
    """Bytes of many adapters: predicted, held in storages, and by which the process grew."""
    draw(model, folder, 0, MANY_RANK)
    bank = AdapterBank(model)
    before = resident()
    for number in range(MANY):
        bank.add(str(number), folder)
    grown = resident() - before
    storages = {}
    for name in bank.names:
        bank.use(name)
        storages |= {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in learned(model).values()}
    ledger = ql.predict_memory(model.config, r=MANY_RANK)
    predicted = MANY * (ledger.row("lora_A").predicted + ledger.row("lora_B").predicted)
    bytes_ = {"predicted": predicted, "held": sum(storages.values()), "resident": grown}
    return {"adapters": MANY, "r": MANY_RANK, "bytes": bytes_}


def measure(rounds: int) -> dict:
    torch.set_num_threads(1)
    names = [f"adapter {number}" for number in range(ROWS)]
    result = {"model": MODEL, "rows": ROWS, "r": RANK, "rounds": rounds}
    with tempfile.TemporaryDirectory() as folder:
        model, _ = ql.load(MODEL, dtype=torch.bfloat16, progress=False)
        model.eval()
        folders = {name: draw(model, Path(folder) / name, number, RANK) for number, name in enumerate(names)}
        bank = AdapterBank(model)
        for name in names:
            bank.add(name, folders[name])
        result["cases"] = cases(bank, names, rounds)
        bank.use(None)
        result["enter"] = spread([entered(bank, names) for _ in range(rounds)])
        del bank
        result["memory"] = weigh(model, Path(folder) / "many")
    about = {"date": date.today().isoformat(), "processor": cpu_name(), "threads": 1, "torch": torch.__version__}
    return about | result


def section(result: dict) -> str:
    """The section of docs/many_adapters.md, in Markdown."""
    lines = [
        f"Measured on {result['date']}: {result['processor']}, {result['threads']} thread, torch {result['torch']}; "
        f"{result['model']} in nf4, adapters of r = {result['r']} on all linear layers, {result['rounds']} rounds. A "
        "ratio is the median of the rounds, with its quartiles.",
        "",
        f"| {result['rows']} rows | dtype | one adapter, s | {result['rows'] // 2} adapters, ratio | "
        f"{result['rows']} adapters, ratio |",
        "|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        ratios = " | ".join(f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in case["ratio"].values())
        lines.append(f"| {case['what']} | {case['dtype']} | {case['seconds']['one']['median']:.2f} | {ratios} |")
    memory = result["memory"]
    found = memory["bytes"]
    words = (
        f"Entering the block takes {1000 * result['enter']['median']:.0f} ms, because the adapters of the batch are "
        f"copied into one tensor for each layer. {memory['adapters']} adapters of r = {memory['r']} take "
        f"{found['predicted']:,} bytes by the ledger and {found['held']:,} in memory; the process grew by "
        f"{found['resident'] / found['held']:.2f} times that, because it reused memory that it had freed. Four "
        "adapters have two rows each that do not lie side by side, so rows move there and back; eight are in order."
    )
    return "\n".join([*lines, "", words, ""])


def in_page(text: str, result: dict) -> str:
    """Renew the section between the two marks of `text`. Raises ValueError if a mark is missing."""
    return between(text, BEGIN, END, section(result), "docs/many_adapters.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="renew the page from the JSON, measure nothing")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    args = parser.parse_args()
    if not args.render:
        write(OUT, json.dumps(measure(args.rounds), indent=1) + "\n")
    write(PAGE, in_page(PAGE.read_text("utf-8"), json.loads(OUT.read_text("utf-8"))))


if __name__ == "__main__":
    main()
