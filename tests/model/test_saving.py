"""save_pretrained writes an adapter, and refuses a model in 4 bits by name."""

import pickle
from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_lab.adapters.lora import add_lora
from qlora_lab.adapters.peft_format import load_adapter
from qlora_lab.model.load import load

pytestmark = pytest.mark.filterwarnings("ignore:.*are in 4 bits;")
ADVICE = r"packed layers of QLoRA Lab: call quantize_folder"


@pytest.mark.long
@pytest.mark.parametrize("codebook", ["nf4", None])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_model_is_written_so_that_both_read_it_or_refused(folder, tmp_path, codebook, with_adapter):
    model, tokenizer = load(folder, codebook, dtype=torch.float32, progress=False)
    model = add_lora(model, r=2) if with_adapter else model
    ids = torch.arange(3, 20)[None]
    for one in (model, deepcopy(model), pickle.loads(pickle.dumps(model))):
        if with_adapter:
            with torch.no_grad():
                next(m for m in one.modules() if hasattr(m, "lora_B")).lora_B.fill_(0.5)
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "training_args.bin").touch()  # as transformers' Trainer leaves
            one.save_pretrained(tmp_path / "out", safe_serialization=True)
            names = {"adapter_config.json", "adapter_model.safetensors", "qlora-lab.sha256", "training_args.bin"}
            assert {path.name for path in (tmp_path / "out").iterdir()} == names
            fresh, _ = load(folder, codebook, dtype=torch.float32, progress=False)
            assert torch.equal(load_adapter(fresh, tmp_path / "out")(ids).logits, one(ids).logits)
        elif codebook:
            with pytest.raises(ValueError, match=ADVICE):
                one.save_pretrained(tmp_path / "out", safe_serialization=True)
            assert not (tmp_path / "out").exists()
        else:
            one.save_pretrained(tmp_path / "out")
            tokenizer.save_pretrained(tmp_path / "out")
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
            ours, _ = load(tmp_path / "out", None, dtype=torch.float32, progress=False)
            assert torch.equal(theirs(ids).logits, one(ids).logits) and torch.equal(ours(ids).logits, one(ids).logits)
