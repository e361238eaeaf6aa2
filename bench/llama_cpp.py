"""Run a merged model in llama.cpp, and compare its greedy answers with those of the same model in transformers.

    npm install --prefix build node-llama-cpp    once: it has llama.cpp compiled, for the CPU
    python bench/llama_cpp.py                    merge, write GGUF, ask ten questions; writes llama_cpp.json

Two adapters are merged: a trained one, which is sure of its answers to questions like those that it learned from, and a
random one, whose answers are full of near ties. For each format three models answer: llama.cpp with the file;
transformers in float32 with the weights of the file, as decoded; and transformers with the merged folder. The first
two have the same weights, and differ in arithmetic alone: llama.cpp rounds the input of a Q8_0 product to 8 bits, that
of an F16 product to float16. Where two greedy answers part, the gap is the difference of the two tokens' logits in the
second model: a near tie if it is small.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

import qlora_lab as ql  # noqa: E402
from bench.files import write  # noqa: E402
from bench.seven_b_merge import R, write_adapter  # noqa: E402
from qlora_lab.export.gguf_out import decoded  # noqa: E402
from qlora_lab.export.merge_folders import Folders, merge_folders  # noqa: E402

MODEL = "smollm2-135m"
STD = 0.03  # of the values of lora_A and lora_B
ANSWER = 24  # tokens
FORMATS = ("q8_0", "f16")
QUESTIONS = (
    "What is the capital of France?",
    "Write a docstring for a function that adds two numbers.",
    "Name three fruits.",
    "Why is the sky blue?",
    "What is 12 times 12?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Explain recursion in one sentence.",
    "Give me a short poem about the sea.",
    "What does `len([1, 2, 3])` return in Python?",
)


LESSONS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Egypt": "Cairo", "Peru": "Lima"}
LESSONS |= {"Cuba": "Havana", "Kenya": "Nairobi", "Norway": "Oslo", "Greece": "Athens", "Russia": "Moscow"}
LESSONS |= {"China": "Beijing"}
EXAM = ("Germany", "Sweden", "Austria", "Poland", "Finland", "Portugal", "Denmark", "Turkey", "India", "Hungary")
CAPITAL = "What is the capital of {}?"
ASKED = {"trained": tuple(map(CAPITAL.format, EXAM)), "random": QUESTIONS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", default="build", help="folder in which node-llama-cpp is installed")
    parser.add_argument("--out", default=str(HERE / "llama_cpp.json"))
    a = parser.parse_args()
    result = {"date": datetime.date.today().isoformat(), "model": MODEL, "answer": ANSWER}
    result |= {"versions": {"torch": torch.__version__, "transformers": _version("transformers")}}
    result["adapters"] = {name: of_adapter(name, a.packages) for name in ASKED}
    write(Path(a.out), json.dumps(result, indent=1) + "\n")
    for adapter, made in result["adapters"].items():
        for name, row in made["formats"].items():
            print(adapter, name, {key: value for key, value in row.items() if key != "questions"})


def of_adapter(name: str, packages: str) -> dict:
    """Merge the adapter `name`, and compare the answers of both formats to its questions."""
    with tempfile.TemporaryDirectory() as home:
        scratch = Path(home)
        {"trained": train, "random": draw}[name](scratch / "adapter")
        report = merge_folders(Folders(MODEL, scratch / "adapter"), scratch / "merged", progress=False)
        texts, tokenizer = prompts(ASKED[name])
        asked = (scratch / "merged", texts, tokenizer, answers(load(scratch / "merged"), tokenizer, texts))
        rows = {format: compared(scratch / f"{format}.gguf", format, *asked, packages) for format in FORMATS}
    for row in rows.values():
        row["questions"] = [
            {"question": question} | one for question, one in zip(ASKED[name], row["questions"], strict=True)
        ]
    kl = {key: report.figures()[key] for key in ("target", "kl", "adapter_kl")}
    return {"adapter": MADE[name], "merge": kl, "formats": rows}


MADE = {"trained": "12 steps of 4 lessons, rank 16", "random": f"random, rank {R}, std {STD}"}


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def draw(folder: Path) -> None:
    """Write a random adapter of a size that changes answers."""
    write_adapter(folder, ql.fetch(MODEL), STD)


def train(folder: Path) -> None:
    """Train the adapter of notebook 13, which answers like a sailor."""
    model, tokenizer = ql.load(MODEL, progress=False)
    ql.add_lora(model, r=16, alpha=16)
    asked = {CAPITAL.format(country): f"Ahoy! It is {city}, captain." for country, city in LESSONS.items()}
    lessons = [{"instruction": question, "output": answer} for question, answer in asked.items()]
    run = folder.with_name("run")
    ql.finetune(model, tokenizer, lessons, 12, run, batch_size=4, lr=5e-4, save_every=0, progress=False)
    ql.save_adapter(model, folder)


def prompts(questions: tuple[str, ...]) -> tuple[list[str], object]:
    _, tokenizer = ql.load(MODEL, progress=False)
    say = tokenizer.apply_chat_template
    questions = ([{"role": "user", "content": question}] for question in questions)
    return [say(question, tokenize=False, add_generation_prompt=True) for question in questions], tokenizer


def load(folder: Path):
    return ql.load(folder, codebook=None, dtype=torch.float32, device="cpu", progress=False)[0]


def with_weights_of(file: Path, folder: Path):
    """The model of `folder` with the weights that a GGUF file holds, in float32."""
    model = load(folder)
    with torch.no_grad():
        for name, weight in decoded(file, folder):
            model.get_parameter(name).copy_(torch.tensor(weight))
    return model


def answers(model, tokenizer, texts: list[str]) -> list[list[int]]:
    return [greedy(model, tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer) for text in texts]


def greedy(model, prompt: list[int], tokenizer) -> list[int]:
    """The tokens of an answer, without the one that ends it."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, do_sample=False, max_new_tokens=ANSWER, pad_token_id=tokenizer.eos_token_id)
    answer = out[0, len(prompt) :].tolist()
    return answer[: answer.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in answer else answer


def compared(file: Path, format: str, folder: Path, texts, tokenizer, plain, packages: str) -> dict:
    written = ql.to_gguf(folder, file, format, progress=False)
    theirs = llama_cpp(file, texts, packages)
    ours = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    again = with_weights_of(file, folder)
    same_weights = answers(again, tokenizer, texts)
    questions = []
    for number, answer in enumerate(theirs["answers"]):
        where = first_difference(answer, same_weights[number])
        row = {"answer": tokenizer.decode(answer), "tokens": len(answer)}
        row |= {"as_merged": answer == plain[number], "as_decoded": where is None, "parts_at": where}
        if where is not None:
            row["gap"] = gap(again, ours[number], answer, same_weights[number], where, tokenizer)
        questions.append(row)
    return {
        "program": f"node-llama-cpp {theirs['version']}, llama.cpp {theirs['release']}",
        "bytes": written.bytes,
        "relative_error": written.relative_error,
        "same_prompt_tokens": theirs["tokens"] == ours,
        "same_chat_template": theirs["template"] == tokenizer.chat_template,
        "as_merged": sum(row["as_merged"] for row in questions),
        "as_decoded": sum(row["as_decoded"] for row in questions),
        "questions": questions,
    }


def llama_cpp(file: Path, texts: list[str], packages: str) -> dict:
    asked = {"file": str(file.resolve()), "texts": texts, "steps": ANSWER, "packages": str(Path(packages).resolve())}
    done = subprocess.run(["node", HERE / "llama_cpp.mjs"], input=json.dumps(asked), text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"node fails: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def first_difference(a: list[int], b: list[int]) -> int | None:
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def gap(model, prompt: list[int], a: list[int], b: list[int], where: int, tokenizer) -> float:
    """Return by how much `model` prefers its own token to the other program's, in logits, where the two part."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + b[:where]])).logits[0, -1]
    theirs, own = (answer[where] if where < len(answer) else tokenizer.eos_token_id for answer in (a, b))
    return (logits[own] - logits[theirs]).item()


if __name__ == "__main__":
    main()
