"""Time a training step of SmolLM2-135M on the CPU: ours, PEFT with bitsandbytes, and ours without quantisation.

    python bench/train_step.py                     measure and write train_step.json, a quarter of an hour; what was
                                                   measured on another processor stays in it
    python bench/train_step.py --quick --out FILE  a toy model, two rounds: to see that it runs

A step is forward, backward, clipping at 0.3 and AdamW, in bf16: 4 rows of 256 random tokens, LoRA r=16 on all linear
layers, NF4 with double quantization. Contenders:

    ours                  load, add_lora, answer_loss; memory is recycled, as the trainer does
    unquantised           the same on a bf16 model: the floor, without decoding and narrow weights
    PEFT, prepared        PEFT + bitsandbytes with prepare_model_for_kbit_training, as their guides say: weights that
                          are not quantised become float32
    PEFT, as loaded       the same without that call: weights that are not quantised stay bf16

PEFT runs twice, with the allocator as it is ("stock") and with one that recycles memory ("recycled"). Each contender
is a process of its own that waits for its turn, because the allocator cannot be changed back. A figure is the median of
`rounds` steps; low and high are quartiles. A ratio is their time over ours in the same round. Peak memory is the
highest resident set of the first two steps minus the one after loading. Nothing asserts a time.
"""

import argparse
import datetime
import multiprocessing
import statistics
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.cpu import versions  # noqa: E402
from bench.steps import TRAIN_STEP, keep, of_processor, render  # noqa: E402
from bench.timing import cpu_name, in_turn, peak_bytes  # noqa: E402
from qlora_lab.data.dataset import IGNORED  # noqa: E402
from qlora_lab.model.modes import checkpointing  # noqa: E402
from qlora_lab.train.allocator import recycle_memory  # noqa: E402
from qlora_lab.train.loss import answer_loss  # noqa: E402

OUT = HERE / TRAIN_STEP
R = 16
CLIP = 0.3
LR = 2e-4
OURS = "ours"
OWN_KERNELS = "kernels of the layers"  # they decode panels, and multiply an adapter where bf16 products win
# name -> (who, whether memory is recycled)
CONTENDERS = {
    OURS: ("ours", True),
    "unquantised": ("unquantised", True),
    "PEFT, prepared, stock": ("prepared", False),
    "PEFT, prepared, recycled": ("prepared", True),
    "PEFT, as loaded, stock": ("as loaded", False),
    "PEFT, as loaded, recycled": ("as loaded", True),
}


class Case(NamedTuple):
    """What all steps of one comparison have in common."""

    folder: str
    rows: int
    length: int
    labels: int  # of each row, at its end: docstrings have an eighth (LOG.md), pretraining all
    checkpointing: bool


def batch_of(case: Case) -> dict[str, torch.Tensor]:
    from transformers import AutoConfig

    size = AutoConfig.from_pretrained(case.folder, trust_remote_code=False).vocab_size
    ids = torch.randint(size, (case.rows, case.length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : case.length - case.labels] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def build_ours(case: Case, codebook: str | None) -> torch.nn.Module:
    import qlora_lab as ql

    model, _ = ql.load(case.folder, codebook, dtype=torch.bfloat16, device="cpu", progress=False)
    ql.add_lora(model, R)
    return model


def build_peft(case: Case, prepared: bool) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    options = {"quantization_config": four_bit, "dtype": torch.bfloat16, "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(case.folder, trust_remote_code=False, **options)
    if prepared:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = LoraConfig(r=R, lora_alpha=R, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def our_loss(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    summed, count = answer_loss(model, batch)
    return summed / count


def peft_loss(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    return model(**batch, use_cache=False).loss


WHO = {
    "ours": (partial(build_ours, codebook="nf4"), our_loss),
    "unquantised": (partial(build_ours, codebook=None), our_loss),
    "prepared": (partial(build_peft, prepared=True), peft_loss),
    "as loaded": (partial(build_peft, prepared=False), peft_loss),
}


def train_step(model: torch.nn.Module, optimizer, batch: dict, loss_of) -> float:
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(model, batch)
    loss.backward()
    with torch.profiler.record_function("optimizer"):
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
    return loss.item()


def serve(pipe, who: str, recycled: bool, case: Case) -> None:
    """The main function of a child: load, then obey the pipe until it closes."""
    if recycled and not recycle_memory():
        sys.exit("this C library cannot recycle memory: only glibc can")
    build, loss_of = WHO[who]
    model = build(case).train()
    batch = batch_of(case)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    step = partial(train_step, model, optimizer, batch, loss_of)
    answers = {
        "step": step,
        "peak": lambda: peak_bytes(lambda: [step(), step()]),
        "profile": lambda: profile(step, model.config.vocab_size),
    }
    pipe.send("ready")
    with checkpointing(model) if case.checkpointing and loss_of is our_loss else nullcontext():  # PEFT has its own
        while (question := pipe.recv()) != "end":
            pipe.send(answers[question]())


class Child:
    """A contender in a process of its own."""

    def __init__(self, who: str, recycled: bool, case: Case):
        context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, who, recycled, case), daemon=True)
        self.process.start()
        theirs.close()  # so that a dead child is an EOFError here, not an endless wait
        self.steps: list[tuple[float, float]] = []  # (seconds, loss) of each step
        self.pipe.recv()

    def ask(self, question: str):
        self.pipe.send(question)
        return self.pipe.recv()

    def step(self, bar: tqdm) -> None:
        start = perf_counter()
        loss = self.ask("step")
        self.steps.append((perf_counter() - start, loss))
        bar.update()


@contextmanager
def child(name: str, case: Case):
    contender = Child(*CONTENDERS[name], case)
    try:
        yield contender
    finally:
        if contender.process.is_alive():
            contender.pipe.send("end")
        contender.process.join()


def measure(case: Case, rounds: int, profiled: bool) -> dict:
    """Seconds, ratios, peaks and, if requested, a profile, for each contender."""
    with ExitStack() as stack, tqdm(total=len(CONTENDERS) * (rounds + 4), unit="step") as bar:
        children = {}
        peaks = {}
        for name in CONTENDERS:
            children[name] = stack.enter_context(child(name, case))
            peaks[name] = children[name].ask("peak")
            bar.update(2)
        seconds = in_turn({name: partial(contender.step, bar) for name, contender in children.items()}, rounds, 0.0)
        ours = [s for s, _ in children[OURS].steps[-rounds:]]
        results = {
            "date": datetime.date.today().isoformat(),
            "checkpointing": case.checkpointing,
            "tokens": case.rows * case.length,
            "labels": case.rows * case.labels,
            "seconds": seconds,
            "tokens_per_second": {n: case.rows * case.length / s["median"] for n, s in seconds.items()},
            "ratio": {
                name: quartiles([s / our for (s, _), our in zip(contender.steps[-rounds:], ours, strict=True)])
                for name, contender in children.items()
            },
            "peak_bytes": peaks,
            # the peak took two steps
            "loss_of_third_step": {name: contender.steps[0][1] for name, contender in children.items()},
        }
        if profiled:
            results["profile"] = {name: contender.ask("profile") for name, contender in children.items()}
    return results


def quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def profile(step, vocabulary: int) -> dict[str, float]:
    """group -> own seconds of its operations in one step, largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as recorded:
        step()
    total = Counter()
    for event in recorded.events():
        total[group_of(event, vocabulary)] += event.self_cpu_time_total / 1e6
    return dict(total.most_common())


def group_of(event, vocabulary: int) -> str:
    """The group of an operation, from its name, its shapes, and the operations that called it."""
    sizes = {size for shape in event.input_shapes if shape for size in shape if isinstance(size, int)}
    if vocabulary in sizes:
        return "head and loss"
    if event.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
        return "LoRA products" if R in sizes else "base products"
    own_time_of_a_layer = "MatMul4bit" in event.name  # numba's kernels show as time of their caller
    while event:
        if "scaled_dot_product" in event.name or event.name.startswith("_Attention"):  # torch's, ours
            return "attention"
        if event.name == "optimizer":
            return "clipping and AdamW"
        if "dequantize_4bit" in event.name or own_time_of_a_layer:
            return OWN_KERNELS
        if "MatMul4bit" in event.name:
            return "casts in the layers"
        event = event.cpu_parent
    return "norms, rotary, activations, sums, casts"


def table(result: dict) -> str:
    lines = [f"{result['processor']}, {result['threads']} threads; ratio: its time over ours"]
    for case in result["cases"]:
        checkpointing = "on" if case["checkpointing"] else "off"
        labels = f"{case['labels']} labels of {case['tokens']} tokens"
        lines.append(f"\ngradient checkpointing {checkpointing}, {labels}, {case['date']}")
        for name, s in case["seconds"].items():
            ratio = case["ratio"][name]
            peak = case["peak_bytes"][name]
            memory = "unknown" if peak is None else f"{peak / 2**20:.0f} MiB"
            lines.append(
                f"  {name:26} {case['tokens_per_second'][name]:6.0f} tokens/s  {s['median']:6.2f} s  "
                f"x {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})  peak +{memory}"
            )
        for name, groups in case.get("profile", {}).items():
            whole = sum(groups.values())
            lines.append(f"  {name}: " + ", ".join(f"{g} {s / whole:.0%}" for g, s in groups.items()))
    return "\n".join(lines)


def toy(folder: str) -> None:
    """Save a model and a tokenizer that are too small to learn."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = WordLevel({str(i): i for i in range(config.vocab_size)}, unk_token="0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)


def cases(folder: str, rows: int, length: int) -> list[Case]:
    eighth = length // 8
    return [Case(folder, rows, length, *rest) for rest in ((eighth, False), (eighth, True), (length, False))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy model, two rounds, the first case only")
    parser.add_argument("--case", type=int, choices=range(3), help="measure only this one and keep the others in FILE")
    parser.add_argument("--out", type=Path, default=OUT, help="default: bench/train_step.json")
    args = parser.parse_args()
    if args.quick and args.out == OUT:
        parser.error("--quick measures nothing worth keeping: give --out FILE")
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            toy(folder)
            measured = [measure(cases(folder, 2, 24)[0], 2, profiled=True)]
    else:
        from qlora_lab.model.fetch import resolve

        chosen = cases(str(resolve("smollm2-135m")), 4, 256)
        stored = of_processor(args.out, cpu_name())
        measured = [] if args.case is None or stored is None else stored["cases"]
        for number, case in enumerate(chosen):
            if args.case in (None, number):
                measured[number : number + 1] = [measure(case, 7, profiled=number == 0)]
    result = {
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions() | {"peft": version("peft")},
        "cases": measured,
    }
    keep(args.out, result)
    print(table(result))
    if args.out == OUT:
        render()


if __name__ == "__main__":
    main()
