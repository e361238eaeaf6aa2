"""Time greedy answers of SmolLM2-135M, a token and a prompt, beside transformers, bitsandbytes and llama.cpp.

    npm install --prefix build node-llama-cpp    once, for llama.cpp; without it the others run
    python bench/decode.py                       writes decode.json; leave the machine idle meanwhile
    python bench/decode.py --seven-b             the shape of Llama-2-7B, random bytes; 13 GB of memory, 9 of disk

In each round every contender answers once, each starting with another one: the first token after a prompt, and the rest
one by one. Each library runs in a program of its own (decode_contenders.py, decode.mjs), of which one works at a time,
all with the same number of threads. "floor" is the time of reading all bytes that a token reads, at the speed at which
a copy in the same round moves bytes. llama.cpp reads Q4_1 and Q4_0 files that this library writes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from time import perf_counter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

import qlora_lab as ql  # noqa: E402
from bench.decode_contenders import LLAMA_7B, MODEL, ROWS, Contender, Sample  # noqa: E402
from bench.decode_page import STORED, render  # noqa: E402
from bench.files import write  # noqa: E402
from bench.random_gguf import FORMATS, write_random  # noqa: E402
from bench.timing import cpu_name, spread  # noqa: E402
from qlora_lab.measure.latency import orders  # noqa: E402


class Program:
    """Another process that answers a line of JSON with a line of JSON."""

    def __init__(self, *command: str | Path, first: dict | None = None):
        """first: what it waits for before it says what it is, in `hello`."""
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.hello = self._ask(first)

    def _ask(self, asked: dict | None) -> dict:
        if asked is not None:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self.__exit__()
            raise RuntimeError(f"{self._process.args} ended with {self._process.returncode}: see what it wrote above")
        return json.loads(line)

    def contender(self, name: str) -> Contender:
        def answer(prompt: list[int], tokens: int) -> Sample:
            sample = self._ask({"contender": name, "prompt": prompt, "steps": tokens})
            assert sample["tokens"] == tokens, sample
            return {"first": sample["first"], "rest": sample["rest"]}

        return answer

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def installed(packages: Path) -> bool:
    return (packages / "node_modules" / "node-llama-cpp").exists()


def copy_seconds(n_bytes: int) -> float:
    """Seconds in which a copy moves so many bytes, half of them read and half written."""
    source = torch.ones(2**26)  # 256 MiB: no cache holds it
    target = torch.zeros_like(source)
    start = perf_counter()
    target.copy_(source)
    return (perf_counter() - start) * n_bytes / (2 * source.nbytes)


def measure(contenders: dict[str, Contender], n_bytes: int, sizes: tuple[int, int], rounds: int) -> dict:
    """Seconds of each contender: of the prompt with its first token, and of each token after it."""
    prompt_tokens, tokens = sizes
    prompt = torch.randint(1000, 2000, (prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    for run in contenders.values():
        run(prompt, min(tokens, 3))  # kernels compile, memory is there
    found = {name: {"first": [], "token": []} for name in contenders}
    floors = []
    for order in orders(contenders, rounds):
        for name in order:
            sample = contenders[name](prompt, tokens)
            found[name]["first"].append(sample["first"])
            if tokens > 1:
                found[name]["token"].append(sample["rest"] / (tokens - 1))
        floors.append(copy_seconds(n_bytes))
    rows = {name: {key: spread(values) for key, values in of.items() if values} for name, of in found.items()}
    return {"prompt": prompt_tokens, "tokens": tokens, "rounds": rounds, "bytes": n_bytes, "floor": spread(floors),
            "contenders": rows}  # fmt: skip


def started(stack: ExitStack, ours: list[str], others: list[str], files: dict[str, Path], packages: Path):
    """Start all programs, which end with `stack`. Returns what ours says of itself, contenders, and llama.cpp's hellos.

    ours: arguments of decode_contenders.py. others: programs of it. files: format -> what llama.cpp reads.
    """
    python = [sys.executable, HERE / "decode_contenders.py"]
    first, *rest = (stack.enter_context(Program(*python, *words)) for words in (ours, *([name] for name in others)))
    contenders = {name: program.contender(name) for program in (first, *rest) for name in program.hello["contenders"]}
    hellos = {}
    for format, file in files.items():
        options = {"file": str(file), "threads": torch.get_num_threads(), "packages": str(packages.resolve())}
        program = stack.enter_context(Program("node", HERE / "decode.mjs", first=options))
        name = f"llama.cpp, {format}"
        contenders[name], hellos[name] = program.contender(name), program.hello
    return first.hello, contenders, hellos


def gguf_files(packages: Path, scratch: Path) -> dict[str, Path]:
    """Format -> a path for it; nothing where llama.cpp is not installed."""
    return {format: scratch / f"{format}.gguf" for format in FORMATS if installed(packages)}


def smollm2(packages: Path, scratch: Path, rounds: int, tokens: int) -> list[dict]:
    files = gguf_files(packages, scratch)
    for format, file in files.items():
        ql.to_gguf(ql.fetch(MODEL), file, format, progress=False)
    with ExitStack() as stack:
        ours, every, programs = started(stack, ["ours"], ["peers", "bitsandbytes"], files, packages)
        batch = {"ours": every["ours"], f"ours, {ROWS} rows": every.pop(f"ours, {ROWS} rows")}
        sizes = (every, (32, tokens)), (every, (512, 1)), (batch, (32, tokens))
        rows = [measure(contenders, ours["bytes"], size, rounds) for contenders, size in sizes]
    return [{"model": MODEL, "programs": programs} | row for row in rows]


def seven_b(packages: Path, scratch: Path, rounds: int, layers: int) -> list[dict]:
    shape = LLAMA_7B | {"num_hidden_layers": layers}
    files = gguf_files(packages, scratch)
    for format, file in files.items():
        write_random(file, format, shape)
    with ExitStack() as stack:
        ours, every, programs = started(stack, ["ours_7b", "--layers", str(layers)], [], files, packages)
        result = measure(every, ours["bytes"], (32, 32), rounds)
    return [{"model": "random weights", "shape": shape, "programs": programs} | result]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--packages", type=Path, default=HERE.parent / "build", help="where node-llama-cpp is")
    parser.add_argument("--seven-b", action="store_true", help="only the model with the shape of Llama-2-7B")
    parser.add_argument("--layers", type=int, default=32, help="of that model")
    parser.add_argument("--out", type=Path, default=STORED)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        where = a.packages, Path(home), a.rounds
        rows = seven_b(*where, a.layers) if a.seven_b else smollm2(*where, a.tokens)
    earlier = json.loads(a.out.read_text("utf-8"))["rows"] if a.out.exists() else []
    facts = {"date": date.today().isoformat(), "processor": cpu_name(), "threads": torch.get_num_threads()}
    facts["torch"] = torch.__version__
    # of other machines, and of the other model
    kept = [row for row in earlier if (row["processor"], row["model"]) != (cpu_name(), rows[0]["model"])]
    result = {"rows": sorted(kept + [facts | row for row in rows], key=lambda row: row["processor"])}
    write(a.out, json.dumps(result, indent=1) + "\n")
    if a.out == STORED:
        render()
    for row in rows:
        print(f"{row['model']}: prompt {row['prompt']}, {row['tokens']} tokens, floor {row['floor']['median']:.4f} s")
        for name, of in row["contenders"].items():
            print(f"  {name:28}", {key: round(value["median"], 5) for key, value in of.items()})


if __name__ == "__main__":
    main()
