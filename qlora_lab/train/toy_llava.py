"""Build a small model that sees, in LLaVA's form, out of what there is without a hub.

    pictures of toy-shapes -> a vision tower, trained here -+
                                     a projector, at random +-> a folder, as transformers writes one
                          SmolLM2-135M, or another LLaMA -+

In: scenes to learn from (data/shapes.py). Out: a folder that `load` and transformers read.
Source of the form: LLaVA (arXiv 2304.08485) and 1.5 (2310.03744): a tower of CLIP's architecture, a projector of two
layers, and two stages of training, first the projector and then the language model.

But: CLIP learns from captions of 400 million pictures. This tower learns, in half a minute, from labels: what lies in
each patch, how many there are and on which side. It knows toy-shapes and nothing else.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, cross_entropy
from tqdm.auto import tqdm

from qlora_lab.data.pictures import PLACEHOLDER
from qlora_lab.data.shapes import CELL, SHAPES, SIZE, WORDS, Scene, cells, draw
from qlora_lab.files.out_path import out_path
from qlora_lab.files.replace import replacing_folder
from qlora_lab.model.empty_model import NO_CODE
from qlora_lab.model.fetch import resolve
from qlora_lab.quant.numbers import check_seed, check_whole
from qlora_lab.quant.quantize import dequantize, quantize

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

PATCHES = (SIZE // CELL) ** 2
TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER |= {"image_size": SIZE, "patch_size": CELL}
BATCH = 64  # pictures
RECOLOURED, BLURRED = 40, 12  # of them
RATE = 3e-3
EMPTY = len(SHAPES)  # label of a patch without a shape
# A question and an answer, and nothing else: each token is read in every step.
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def pixels(scenes: Sequence[Scene], progress: bool = False) -> torch.Tensor:
    """Draw scenes as a tower reads them: (scenes, 3, 48, 48) float32 in [-1, 1]."""
    bar = tqdm(scenes, "drawing", unit="picture", leave=False, disable=not progress)
    drawn = torch.from_numpy(np.stack([draw(scene) for scene in bar]))  # (scenes, 48, 48, 3)
    return drawn.permute(0, 3, 1, 2) / 127.5 - 1


class ToyTower(nn.Module):
    """A vision tower, and the heads that taught it. LLaVA takes the tower alone; the heads tell what its patches see.

    vision: a CLIPVisionModel. Its output without the class token, (pictures, 9, 128), is what a projector reads.
    """

    def __init__(self, vision: "CLIPVisionModel"):
        super().__init__()
        self.vision = vision
        sizes = {"kind": EMPTY + 1} | {name: len(WORDS[name]) for name in ("colour", "number", "side")}
        self.heads = nn.ModuleDict({name: nn.Linear(vision.config.hidden_size, n) for name, n in sizes.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return logits of pictures x, (n, 3, 48, 48) in [-1, 1].

        Of each patch: kind, (n, 9, 7), the shape in it, or EMPTY, and colour, (n, 9, 6). Of each picture, from the mean
        of its patches: number, (n, 3), and side, (n, 4).
        """
        patches = self.vision(x).last_hidden_state[:, 1:]  # (n, 9, 128): without the class token, as LLaVA reads it
        picture = patches.mean(1)  # (n, 128)
        return {name: head(patches if name in ("kind", "colour") else picture) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, scenes: Sequence[Scene]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return what each patch holds, (n, 9) int64, a place in SHAPES or EMPTY; and property -> shares, (n, words).

        Shares of colours and shapes are those of the patches, weighted by how surely a patch is not empty.
        """
        found = {name: logits.softmax(-1) for name, logits in self(pixels(scenes)).items()}
        full = 1 - found["kind"][..., EMPTY]  # (n, 9)
        total = full.sum(1, keepdim=True)
        shares = {
            "colour": (full[..., None] * found["colour"]).sum(1) / total,
            "shape": found["kind"][..., :EMPTY].sum(1) / total,
            "number": found["number"],
            "side": found["side"],
        }
        return found["kind"].argmax(-1), shares


def trained_tower(scenes: Sequence[Scene], steps: int = 400, *, seed: int = 0, progress: bool = True) -> ToyTower:
    """Train a tower of two layers of 128 features on labels of the scenes. It takes half a minute on one core.

    Returns it in evaluation mode, float32, frozen. Raises ValueError for no scenes, or less than one step.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    check_whole("steps", steps)
    check_seed(seed)
    if not scenes:
        raise ValueError("there are no scenes: give those of a split's train")
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
        torch.manual_seed(seed)
        tower = ToyTower(CLIPVisionModel(CLIPVisionConfig(**TOWER))).train()
        # CLIP draws positions so small that a model as young as this never hears of them.
        tower.vision.embeddings.position_embedding.weight.data.mul_(15)
        _fit(tower, pixels(scenes, progress), _labels(scenes), steps, progress)
    return tower.requires_grad_(False).eval()


def rounded(module: nn.Module, codebook: str) -> nn.Module:
    """Return a copy whose linear layers went through `codebook`, in blocks of 64 with double quantization.

    It computes as a packed one would, and costs the memory of a plain one: for modules that are small, or looked at.
    """
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = dequantize(quantize(layer.weight.data, codebook, double_quant=True), layer.weight.dtype)
    return module


def _labels(scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
    """Return the word of each property, (scenes,), and kind, (scenes, 9): the shape in each patch, or EMPTY; int64."""
    labels = {name: torch.tensor([words.index(getattr(s, name)) for s in scenes]) for name, words in WORDS.items()}
    kind = torch.full((len(scenes), PATCHES), EMPTY)
    for number, scene in enumerate(scenes):
        for row, column in cells(scene):
            kind[number, SIZE // CELL * row + column] = labels["shape"][number]
    return labels | {"kind": kind}


def _fit(tower: ToyTower, x: torch.Tensor, labels: dict[str, torch.Tensor], steps: int, progress: bool) -> None:
    """Train on random batches, with a rate that rises for a seventh of the steps and then falls to zero."""
    optimizer = torch.optim.AdamW(tower.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.15)
    for _ in tqdm(range(steps), "vision tower", unit="step", disable=not progress):
        picked = torch.randint(len(x), (BATCH,))
        loss = _loss(tower, x[picked], {name: values[picked] for name, values in labels.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _loss(tower: ToyTower, x: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the loss of a batch, () float32.

    Some pairs of colour and shape are missing from training. A tower that learned both from the same pictures would
    take one for a sign of the other, and fail on new pairs. So shapes, numbers and sides are learned from pictures
    whose channels are exchanged at random, and colours from the others, some of them blurred until shapes are gone.
    """
    n = RECOLOURED
    order = torch.rand(n, 3).argsort(1)[:, :, None, None].expand(-1, -1, SIZE, SIZE)
    blurred = avg_pool2d(x[-BLURRED:], 5, 1, 2, count_include_pad=False)
    found = tower(torch.cat([x[:n].gather(1, order), x[n:-BLURRED], blurred]))
    loss = cross_entropy(found["kind"][:n].flatten(0, 1), labels["kind"][:n].flatten())
    loss = loss + cross_entropy(found["number"][:n], labels["number"][:n])
    loss = loss + cross_entropy(found["side"][:n], labels["side"][:n])
    full = labels["kind"][n:] != EMPTY  # (batch - n, 9): an empty patch has no colour
    colour = labels["colour"][n:, None].expand_as(full)
    return loss + cross_entropy(found["colour"][n:][full], colour[full])


def toy_llava(
    out: str | Path,
    tower: ToyTower,
    *,
    language: str | Path = "smollm2-135m",
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Put a tower and a random projector beside a language model, and write them as a LLaVA folder. Returns the folder.

    It cannot see before its projector has learned. language: what `load` takes, of LLaMA's architecture. seed: of the
    projector. Raises FileExistsError for a folder that exists, and whatever fetch raises.
    """
    from transformers import LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    out = out_path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: name a folder that does not, or load this one")
    check_seed(seed)
    source = resolve(language, progress=progress)
    text = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    processor = _processor(source)
    # One more row, that of PLACEHOLDER: it is never read, because patches take its place.
    text.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    config = LlavaConfig(
        vision_config=tower.vision.config,
        text_config=text.config,
        image_token_id=processor.tokenizer.convert_tokens_to_ids(PLACEHOLDER),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.model.vision_tower.load_state_dict(tower.vision.state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    with replacing_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return out


def _processor(source: Path):
    """Return what reads a picture and a question: one PLACEHOLDER in a text becomes nine, one for each patch."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

    tokenizer = AutoTokenizer.from_pretrained(source, **NO_CODE)
    tokenizer.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]})
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    tokenizer.chat_template = TEMPLATE
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" drops
        image_token=PLACEHOLDER,
        chat_template=TEMPLATE,
    )
