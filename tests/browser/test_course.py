"""The course in the real JupyterLab, where each notebook runs once: its controls by key and by mouse, both themes, and
the next day.

00, 01, 02 and 04 run whole. Of the others only the cells with a widget run, on drawn numbers or a toy model where they
need any: nbval runs all cells, and test_stored.py shows all stored outputs. test_follow_weight.py moves along the map
that ends each notebook; here it is looked at where a notebook runs whole.
"""

import re
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect

from tests.browser.controls import move_all
from tests.browser.theme import DARK, LIGHT, resize, set_theme, unreadable

SHOW = Path(__file__).parents[1] / "show"
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
KERNEL = {"kernelspec": {"display_name": "Python 3", "name": "python3"}}
WIDGET = re.compile(r"\b[A-Z]\w+Explorer\((?!.*result)|ql\.live\(|ql\.guess\(|ql\.load\(MODEL, codebook")
DRAWN_LAYERS = """from qlora_lab.quant.plan import Candidate
parts = {"q": 9, "k": 3, "v": 3, "o": 9, "gate": 24, "up": 24, "down": 24}
layers = tuple(f"model.layers.{i}.mlp.{part}_proj" for i in range(30) for part in parts)
numel = np.array(30 * list(parts.values())) * 2**12
sizes = np.array([32, 64, 128, 256, 512, 1024])
drawn = tuple(Candidate("nf4", int(size), False) for size in sizes)
error = np.random.default_rng(0).lognormal(size=210)[:, None] * np.log2(sizes)
choices = planner.Choices(layers, tuple(numel.tolist()), drawn, error, numel[:, None] * (4 + 32 / sizes))"""
DRAWN_MERGES = """from qlora_lab.export.parity import Change, Parity
layers = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(30) for part in "qkvo"]
def drawn(factor):
    left = factor / (8 + factor)
    made = {layer: Change(left * (i % 4 + 1) / 4, left / 2) for i, layer in enumerate(layers)}
    kl = 0.1 * factor**2
    return Parity("requantised", kl * (1 - left), kl, 0.9, 18.0, 19.0, 192, 0.05, made)
factors = survival.FACTORS
survived = survival.Survival(dict.fromkeys(layers, 0.01), {f: drawn(f) for f in factors})"""
TRAINING = "ql.Training(model, tokenizer, train, out, settings)"  # of the default model: minutes
TOY_TRAINING = "__import__('toy_training').toy_training(out)"
CUT = {  # what the cells need
    "03_block_size": DRAWN_LAYERS,
    "05_kernels": "",
    "06_data_types": "",
    "07_lora": "",
    "08_memory": "",
    "09_paged_optimizer": "",
    "10_finetune_llama": "",
    "11_peft_zoo": "",
    "12_results": "",
    "13_merge_lab": DRAWN_MERGES,
    "14_multimodal": "tower = toy_llava.trained_tower(shapes.shapes_split(8, 4).train, 2)",
    "15_answers": "",
}
MOVES = {  # control, key, part of the new alt text
    "01_codebook": [
        ("Bits", "ArrowLeft", "3 bits, offset 0.9330357 by the rule: 8 levels"),  # 1 - (1/14 + 1/16) / 2
        ("Bits", "Home", "2 bits, offset 0.8541667 by the rule: 4 levels"),  # 1 - (1/6 + 1/8) / 2
        ("Bits", "End", "6 bits, offset 0.9921255 by the rule: 64 levels"),  # 1 - (1/126 + 1/128) / 2
        ("Offset", "End", "offset 0.995: 64 levels"),
        ("Symmetric", "Space", "63 levels"),
        ("Reset", "Enter", "4 bits, offset 0.9677083 by the rule: 16 levels"),
    ],
    "02_packing": [
        ("Byte", "ArrowRight", "down_proj, byte 1, at 13,209"),
        ("Byte", "ArrowDown", "down_proj, byte 9,"),
        ("Byte", "End", "down_proj, byte 63,"),
        ("Place", "End", "byte 442,367, at"),
        ("Tensor", "ArrowRight", "gate_proj, byte 442,367, at"),
        ("Byte", "Home", "gate_proj, byte 442,304, at"),
        ("Reset", "Enter", "down_proj, byte 0, at"),
    ],
    "03_block_size": [
        ("Budget", "ArrowRight", "Budget 4.625 bits per parameter"),
        ("Budget", "End", "0.0 % less than 32 for all. Layers by block size: 210 with 32"),
        ("Budget", "Home", "0.0 % less than 1024 for all. Layers by block size: 210 with 1024"),
        ("Reset", "Enter", "Budget 4.5 bits per parameter, 4.5000 spent: "),  # where it was opened
    ],
    "04_double_quant": [
        ("Block size", "ArrowRight", "Constants: 0.06348 bits per parameter, not 0.25"),
        ("Group size", "Home", "Constants: 0.07812 bits per parameter"),
        ("Outlier", "End", "dynamic 0.15 %, int8 2.9 %"),
        ("Mean offset", "Space", "dynamic 0.52 %, int8 2.6 %"),
        ("Reset", "Enter", "Constants: 0.127 bits per parameter, not 0.5"),
    ],
    "05_kernels": [
        ("Weights", "ArrowRight", "204 weights"),
        ("Block size", "ArrowLeft", "blocks of 32"),
        ("Tile", "End", "tile 128: program 0 of 2 loads words 0 to 15"),
        ("Program", "End", "program 7 is not launched; the last is program 1"),
        ("Reset", "Enter", "203 weights, blocks of 64, tile 64: program 0 of 4"),
    ],
    "07_lora": [
        ("Rank r", "ArrowRight", "r=9: 1,152 parameters"),
        ("Size d", "End", "128 x 128"),
        ("Rank r", "Home", "r=1: 256 parameters, 2 % of 16,384"),
        ("Decay", "End", "decay 3"),
        ("Reset", "Enter", "64 x 64, decay 1, r=8: 1,024 parameters"),
    ],
    "08_memory": [
        ("Model", "ArrowRight", "llama-3-8b, nf4/64 + double"),
        ("Codebook", "Home", "nf2/64"),
        ("Block size", "End", "nf2/512"),
        ("r", "End", "r=256"),
        ("Sequence length", "End", "1 x 65536 tokens"),
        ("Rows at once", "End", "16 x 65536 tokens"),
        ("Optimizer", "End", "paged 8-bit AdamW: QLoRA's peak is"),
        ("Double quantization", "Space", "nf2/512, r=256"),
        ("Gradient checkpointing", "Space", "tokens at once, paged 8-bit AdamW: QLoRA's peak is"),
        (
            "Reset",
            "Enter",
            "llama-7b, nf4/64 + double quantization, r=64, 1 x 512 tokens at once, gradient",
        ),
    ],
    "09_paged_optimizer": [
        ("Time", "ArrowRight", "At time 1.45 page 68 is asked for, a fault, and page 93 leaves"),
        ("Budget", "ArrowRight", "a budget of 272 MiB with 136 frames"),
        ("Budget", "End", "0 faults in each step after the first"),
        ("r", "ArrowLeft", "r=15,"),
        ("Page size", "ArrowLeft", "of 1 MiB"),
        ("Moments", "ArrowLeft", "moments of 8 bits: 72.6 MiB of state"),
        ("Play", "Enter", "At time "),
        ("Reset", "Enter", "in 153 pages of 2 MiB, a budget of 256 MiB with 128 frames"),
    ],
    "11_peft_zoo": [
        ("Model", "Home", "llama-7b in 4 bits, LoRA of rank 64 on all linear layers"),
        ("Size", "End", "LoRA of rank 256"),
        ("LoRA's layers", "Home", "LoRA of rank 256 on q and v"),
        ("Method", "ArrowRight", "Houlsby of bottleneck 256"),
        ("Method", "End", "in 4 bits, biases"),
        ("4-bit base", "Space", "in 16 bits, biases"),
        ("Length of a row", "Home", "a step over 16 tokens"),
        ("Reset", "Enter", "llama-2-70b in 4 bits, LoRA of rank 64 on all linear layers"),  # where it was opened
    ],
    "12_results": [
        ("Questions", "ArrowRight", "160 questions in both orders, 1,920 games"),
        ("Worth of the first position", "End", "a first position worth 400 points"),
        ("Each pair in both orders", "Space", "160 questions in one order of each pair, 960 games"),
        ("Order of the games", "End", "order 10 of the games gives Elo A"),
        ("Reset", "Enter", "80 questions in both orders, 960 games, a first position worth 150 points: order 1"),
    ],
    "14_multimodal": [
        (
            "Colour",
            "ArrowRight",
            "Two green rings on the left, a combination that training never showed. In detail: asked for the colour",
        ),
        ("Shape", "Home", "Two green circles on the left"),
        ("Number", "End", "Three green circles on the left"),
        ("Side", "ArrowRight", "Three green circles on the right"),
        ("Question", "End", "asked for the side, the tower answers: as trained"),
        ("Patches read by", "End", "; the tower in NF2 reads "),
        (
            "Reset",
            "Enter",
            "Two red rings on the left, a combination that training showed. In detail: asked for the colour",
        ),
    ],
    "15_answers": [
        ("Texts at once", "ArrowRight", "2 texts at once, 128 tokens each, 4.127 bits per weight"),
        ("Texts at once", "End", "256 texts at once, 128 tokens each, 4.127 bits per weight"),
        ("Context", "End", "memory is the limit for any number of texts"),
        ("Bits per weight", "End", "8192 tokens each, 16 bits per weight"),
        ("Reset", "Enter", "1 text at once, 128 tokens each, 4.127 bits per weight: 187 ms a step"),
    ],
}
EXPLORERS = {"00_start_here": 0, "06_data_types": 2, "07_lora": 2, "10_finetune_llama": 0, "13_merge_lab": 2}  # else 1
CONTROLS = {name: len({control for control, _, _ in moves}) for name, moves in MOVES.items()}
CONTROLS |= {"00_start_here": 0, "10_finetune_llama": 0, "07_lora": 4 + 4, "13_merge_lab": 4 + 3}
CONTROLS |= {"06_data_types": 5 + 21}  # 16 levels, 3 starts, block size and reset
NAMES = sorted(MOVES | EXPLORERS)


def cut(name, folder):
    """A copy of the notebook with its first cell of code, which imports, and the cells that show a widget."""
    path = NOTEBOOKS / f"{name}.ipynb"
    if name not in CUT:
        return path
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    shown = [cell for cell in cells[1:] if WIDGET.search(cell.source) or "MODEL =" in cell.source]
    before = [cell for cell in shown if "MODEL" in cell.source]
    for cell in shown:
        cell.source = cell.source.replace(TRAINING, TOY_TRAINING)
    needed = nbformat.v4.new_code_cell(CUT[name])
    after = [cell for cell in shown if cell not in before]
    notebook = nbformat.v4.new_notebook(metadata=KERNEL, cells=[cells[0], *before, needed, *after])
    nbformat.write(notebook, folder / path.name)
    return folder / path.name


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def course(name, open_notebook, tmp_path_factory):
    return open_notebook(cut(name, tmp_path_factory.mktemp(name)), SHOW / "toy_training.py")


def test_keys_reach_the_kernel(course, name):
    for control, key, said in MOVES.get(name, []):
        assert said in course.move(control, key)


def test_every_control_is_named_and_moves_by_key_and_by_mouse(course, name):
    explorers = EXPLORERS.get(name, 1)
    expect(course.page.locator(".qlora-explorer")).to_have_count(explorers)
    assert move_all(course) == CONTROLS[name]
    assert not explorers or course.unnamed() == []


def test_explorers_are_readable_in_both_themes_and_in_a_narrow_window(course, name):
    page = course.page
    for summary in page.locator(".qlora-explorer summary").all():
        summary.click()  # the source, too
    page.evaluate("document.activeElement.blur()")
    for theme in (DARK, LIGHT):
        set_theme(page, theme)
        for width in (600, 1280):
            resize(page, width)
            assert unreadable(page) == []


def test_pictures_stay_on_the_next_day(course, name):
    """Saved, shut down, opened again."""
    before = course.pictures()
    maps = 0 if name in CUT else 1
    expect(course.page.locator(".qlora-way")).to_have_count(maps)
    guesses = course.page.get_by_text("Run this cell to guess.")
    assert before
    assert not any(guess.is_visible() for guess in guesses.all())  # below the live boxes
    course.reopen()
    explorers = EXPLORERS.get(name, 1)
    course.expect_stills_alone(explorers + maps)
    pictures = course.pictures()
    for _ in range(maps):
        assert pictures.pop().startswith("Station ")  # live, the map is no picture
    assert pictures == before
    assert guesses.count() > 0
    assert all(guess.is_visible() for guess in guesses.all())
