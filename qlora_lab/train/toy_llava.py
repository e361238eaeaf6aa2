"""Build a small model that sees, in LLaVA's form, out of what there is without a hub.

    pictures of toy-shapes -> a vision tower, trained here ---+
            a projector, from patches to embeddings of words -+-> a folder, as transformers writes one
                            SmolLM2-135M, or another LLaMA ---+

In: scenes to learn from (data/shapes.py). Out: a folder that `load` and transformers read.
Source of the form: LLaVA (arXiv 2304.08485) and 1.5 (2310.03744): a tower of CLIP's architecture, a projector of two
layers, and two stages of training, first the projector and then the language model.

But: CLIP learns from captions of 400 million pictures. This tower learns, in half a minute, from labels: what lies in
each patch, and the four properties of the picture. It knows toy-shapes and nothing else. CLIP's features are near those
of words because it has read; this tower has not, so the projector is fitted to words before a language model reads it.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
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
    from transformers import CLIPVisionModel, PreTrainedTokenizerBase

PATCHES = (SIZE // CELL) ** 2
TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER |= {"image_size": SIZE, "patch_size": CELL}
BATCH = 64  # pictures
RATE = 3e-3
PROJECTOR_RATE, PROJECTOR_STEPS = 5e-3, 800
EMPTY = len(SHAPES)  # label of a patch without a shape
# Questions and answers, and nothing else: each token is read in every step. One token of the model's own comes first,
# because models send there whatever attention is not needed (arXiv 2309.17453). With a picture in that place, gradients
# were up to 1,700 long (LOG.md).
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
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
        sizes = {"kind": EMPTY + 1} | {name: len(words) for name, words in WORDS.items()}
        width = vision.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, n, dtype=torch.float32) for name, n in sizes.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return logits of each patch of pictures x, (n, 3, 48, 48) in [-1, 1].

        kind: the shape in the patch, or EMPTY, (n, 9, 7). colour, shape, number, side: of the whole picture, which each
        patch has to know, (n, 9, words), for a language model learns slowly which of nine patches to look at (LOG.md).
        """
        patches = self.vision(x).last_hidden_state[:, 1:]  # (n, 9, 128): without the class token, as LLaVA reads it
        return {name: head(patches) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, scenes: Sequence[Scene]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return what each patch holds, (n, 9) int64, a place in SHAPES or EMPTY; and property -> shares, (n, words).

        Shares are the mean of what the nine patches say.
        """
        shares = {name: logits.softmax(-1) for name, logits in self(pixels(scenes)).items()}
        kind = shares.pop("kind").argmax(-1)
        return kind, {name: share.mean(1) for name, share in shares.items()}


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """Set torch's default dtype, in which transformers makes a new model, and then the caller's again."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trained_tower(scenes: Sequence[Scene], steps: int = 400, *, seed: int = 0, progress: bool = True) -> ToyTower:
    """Train a tower of two layers of 128 features on labels of the scenes. It takes half a minute on one core.

    Returns it in evaluation mode, float32, frozen. Raises ValueError for no scenes, or less than one step.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    check_whole("steps", steps)
    check_seed(seed)
    if not scenes:
        raise ValueError("there are no scenes: give those of a split's train")
    with torch.random.fork_rng(devices=[]), _float32_by_default():  # the caller's random state stays as it is
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
    indices = {name: [words.index(getattr(scene, name)) for scene in scenes] for name, words in WORDS.items()}
    labels = {name: torch.tensor(of, dtype=torch.int64) for name, of in indices.items()}
    kind = torch.full((len(scenes), PATCHES), EMPTY, dtype=torch.int64)
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
        loss = 0
        for name, logits in tower(x[picked]).items():  # (batch, 9, words)
            wanted = labels[name][picked].view(BATCH, -1).expand(-1, PATCHES)  # a picture's word is that of each patch
            loss = loss + cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def toy_llava(
    out: str | Path,
    tower: ToyTower,
    scenes: Sequence[Scene],
    *,
    language: str | Path = "smollm2-135m",
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Put a tower and a projector beside a language model, and write them as a LLaVA folder. Returns the folder.

    The projector is fitted to words that describe `scenes`; the language model has not yet been asked about a picture.
    language: what `load` takes, of LLaMA's architecture. seed: of the projector. Raises
    FileExistsError for a folder that exists, ValueError for no scenes, and whatever fetch raises.
    """
    from transformers import LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    out = out_path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: name a folder that does not, or load this one")
    check_seed(seed)
    if not scenes:
        raise ValueError("there are no scenes: give those that the tower learned from")
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
    with torch.random.fork_rng(devices=[]), _float32_by_default():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)  # float32, in which the projector is fitted
        embeddings = text.get_input_embeddings().weight.detach()
        words = _captions(_labels(scenes), embeddings, processor.tokenizer)
        _fit_projector(model.model.multi_modal_projector, _patches(tower, scenes), words, progress)
    model.to(torch.bfloat16)
    model.model.vision_tower.load_state_dict(tower.vision.state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    with replacing_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return out


@torch.no_grad()
def _patches(tower: ToyTower, scenes: Sequence[Scene]) -> torch.Tensor:
    """Return what the tower makes of each patch, (scenes, 9, 128); of a few hundred scenes at once."""
    parts = (pixels(scenes[start : start + 256]) for start in range(0, len(scenes), 256))
    return torch.cat([tower.vision(part).last_hidden_state[:, 1:] for part in parts])


def first_tokens(words: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token that each word begins with, where it begins a text: an answer is told by it."""
    return [tokenizer(word, add_special_tokens=False).input_ids[0] for word in words]


def _captions(labels: dict[str, torch.Tensor], embeddings: torch.Tensor, tokenizer) -> torch.Tensor:
    """Return an embedding for each patch, (scenes, 9, width) float32: a caption, word by word, again and again.

    "red ring two left red ring two left red". The words are the tokens that answers begin with.
    """
    words = []
    for name, known in WORDS.items():
        words.append(embeddings[first_tokens(known, tokenizer)].float()[labels[name]])  # (scenes, width)
    return torch.stack([words[patch % len(words)] for patch in range(PATCHES)], dim=1)


def _fit_projector(projector: nn.Module, patches: torch.Tensor, words: torch.Tensor, progress: bool) -> None:
    """Fit what the projector makes of patches, (pictures, 9, 128), to words, (pictures, 9, width)."""
    # Features are five times as large as usual inputs, and most of a word is what all words share.
    with torch.no_grad():
        projector.linear_1.weight.div_(patches.std())
        projector.linear_2.bias.copy_(words.mean((0, 1)))
    optimizer = torch.optim.AdamW(projector.parameters(), lr=PROJECTOR_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PROJECTOR_RATE, total_steps=PROJECTOR_STEPS)
    for _ in tqdm(range(PROJECTOR_STEPS), "projector", unit="step", disable=not progress):
        picked = torch.randint(len(patches), (BATCH,))
        loss = (projector(patches[picked]) - words[picked]).square().mean() / words.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


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
