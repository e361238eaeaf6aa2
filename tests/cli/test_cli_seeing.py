"""`--also` and `--parts`: the parts of a model that sees, on the command line."""

import json

import pytest
from PIL import Image

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.adapters.adapter import learned
from qlora_lab.memory.sight import PROJECTOR, TOWER
from qlora_lab.memory.weights import predicted_weights
from qlora_lab.model.linear4bit import Linear4bit

pytestmark = pytest.mark.filterwarnings("ignore:.*are in 4 bits;")


@pytest.fixture
def data(tmp_path):
    """Two pictures, and the question which colour."""
    for name in ("red", "blue"):
        Image.new("RGB", (20, 20), name).save(tmp_path / f"{name}.png")
    records = [{"image": f"{name}.png", "prompt": "<image> Which?", "completion": name} for name in ("red", "blue")]
    (tmp_path / "colours.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path / "colours.jsonl"


def run(*words) -> int:
    return cli.main([*map(str, words), "--quiet"])


def test_a_copy_has_the_parts_in_4_bits_that_are_named(llava_folder, tmp_path, capsys):
    assert run("quantize", llava_folder, "--out", tmp_path / "q", "--also", TOWER, PROJECTOR) == 0
    assert predicted_weights(tmp_path / "q") == predicted_weights(llava_folder, also=(TOWER, PROJECTOR))
    assert run("generate", "what?", "--model", llava_folder, "--also", "tower") == 2
    said = capsys.readouterr().err
    assert (
        f"'tower' is not a part with linear layers beside the language model: choose from {PROJECTOR}, {TOWER}" in said
    )


def test_a_list_of_parts_takes_the_words_behind_it(capsys):
    with pytest.raises(SystemExit) as end:
        run("generate", "--model", "llava", "--also", TOWER, "hello")
    assert end.value.code == 2
    assert "are required: question (write it before the options); --help" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("sweep", "smollm2-135m")
    assert "are required: --out; --help" in capsys.readouterr().err


def test_a_projector_learns_beside_packed_parts(llava_folder, data, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["finetune", "--model", llava_folder, "--data", data, "--held-out", 0, "--steps", 1, "--out", out]
    words += ["--batch-size", 2, "--max-length", 64, "--method", "full", "--also", TOWER]
    assert run(*words, "--parts", PROJECTOR) == 0
    model, _ = ql.load(llava_folder, also=TOWER, progress=False)
    ql.load_adapter(model, out / "adapter")
    assert {name.split(".")[1] for name in learned(model)} == {PROJECTOR}
    assert isinstance(model.model.vision_tower.encoder.layers[0].mlp.fc1, Linear4bit)
    capsys.readouterr()
    assert run(*words, "--overwrite") == 2  # all of it
    assert "method full needs weights that are not quantised: add codebook none" in capsys.readouterr().err
    assert run(*words, "--overwrite", "--parts", "language_model") == 2
    said = capsys.readouterr().err
    assert "language_model" in said and "is packed in 4: load it with codebook=None (--codebook none)" in said
    assert run(*words[:-4], "--parts", PROJECTOR, "--overwrite") == 2
    assert "parts is no option of method lora: its options are r, alpha" in capsys.readouterr().err
