"""Sizes of what stands beside the language model of a LLaVA: a vision tower of CLIP's architecture, and a projector.

In: the parts of a LLaVA's configuration. Out: a Sight, from which the ledger counts weights and what a step keeps.
A frozen tower keeps nothing for the backward pass, because nothing that learns comes before it. A projector that learns
keeps its two inputs, and from there on a gradient flows through the whole language model.
Source: LLaVA-1.5 (arXiv 2310.03744), section 3.3, for the projector of two layers; CLIP (2103.00020) for the tower.
Not here: towers of other families, whose weights alone qlora_lab.memory.weights counts.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from qlora_lab.memory.linear_shape import LinearShape, part_of, size_of

if TYPE_CHECKING:
    from qlora_lab.memory.setup import Setup
    from qlora_lab.memory.shape import Shape

TOWER, PROJECTOR = "vision_tower", "multi_modal_projector"
LANGUAGE, HEAD = "language_model", "lm_head"
TOWERS = ("clip_vision_model",)
# Configurations omit what equals the default of transformers' CLIPVisionConfig.
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 224, "patch_size": 32}
CLIP |= {"num_channels": 3}


class Part(NamedTuple):
    """What stands beside a language model, under one name."""

    name: str  # TOWER or PROJECTOR, as `also` and `parts` call it
    linears: list[tuple[LinearShape, int]]  # each with the number of its like
    rest: int  # elements of all that is never packed: biases, norms, embeddings, patches


@dataclass(frozen=True)
class Sight:
    """A tower, a projector, and what passes between them."""

    layers: int
    width: int  # of the tower
    inner: int  # of its MLPs
    positions: int  # tokens of one picture in the tower: its patches, and one for all
    patch: int  # numbers of one patch, all channels
    joined: int  # layers of the tower whose outputs the projector reads side by side
    cropped: bool  # the token for all is left out
    hidden: int  # d of the language model
    bias: bool  # of the projector

    @property
    def tokens(self) -> int:
        """Tokens of one picture in the language model."""
        return self.positions - self.cropped

    @property
    def tower(self) -> Part:
        w, f = self.width, self.inner
        attention = [LinearShape(name, w, w, bias=True) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
        linears = [*attention, LinearShape("fc1", f, w, bias=True), LinearShape("fc2", w, f, bias=True)]
        biases = self.layers * sum(linear.out_features for linear in linears)
        norms = 2 * w * (2 * self.layers + 2)  # two in each layer, one before the first and one after the last
        embeddings = w * (self.positions + 1 + self.patch)  # of places, of the token for all, of patches
        return Part(TOWER, [(linear, self.layers) for linear in linears], biases + norms + embeddings)

    @property
    def projector(self) -> Part:
        first = LinearShape("linear_1", self.hidden, self.joined * self.width, self.bias)
        second = LinearShape("linear_2", self.hidden, self.hidden, self.bias)
        return Part(PROJECTOR, [(first, 1), (second, 1)], 2 * self.hidden * self.bias)

    @property
    def parts(self) -> tuple[Part, Part]:
        return self.tower, self.projector

    @property
    def parameters(self) -> int:
        return sum(part.rest + sum(n * linear.numel for linear, n in part.linears) for part in self.parts)

    @property
    def features(self) -> int:
        """Elements that the projector reads of one picture: a copy, which the token for all is no part of."""
        return self.joined * self.width * self.tokens


def sight_of(config: dict, where: str, hidden: int) -> Sight:
    """Read the Sight of a LLaVA's configuration. Raises ValueError for a tower of another family."""
    vision = part_of(config, "vision_config", where)
    family = vision.get("model_type")
    if family not in TOWERS:
        raise ValueError(
            f"{where} has the vision tower {family!r}, whose layers are unknown here: the ledger knows "
            f"{', '.join(TOWERS)}; qlora_lab.memory.weights counts the weights of any"
        )
    vision = CLIP | {name: value for name, value in vision.items() if value is not None}
    sizes = {name: size_of(vision, name, f"{where}, vision_config") for name in CLIP}
    layer = config.get("vision_feature_layer", -2)  # or a list of them
    return Sight(
        layers=sizes["num_hidden_layers"],
        width=sizes["hidden_size"],
        inner=sizes["intermediate_size"],
        positions=(sizes["image_size"] // sizes["patch_size"]) ** 2 + 1,
        patch=sizes["num_channels"] * sizes["patch_size"] ** 2,
        joined=len(layer) if isinstance(layer, (list, tuple)) else 1,
        cropped=config.get("vision_feature_select_strategy", "default") == "default",
        hidden=hidden,
        bias=bool(config.get("multimodal_projector_bias", True)),
    )


def check_seeing(shape: "Shape", setup: "Setup") -> None:
    """Raise ValueError for pictures and parts that the model does not have, or whose training is not counted."""
    name, sight = shape.name, shape.sight
    for option, asked in (("also", setup.also), ("parts", setup.parts), ("pictures", setup.pictures)):
        if asked and sight is None:
            given = " ".join(asked) if isinstance(asked, tuple) else asked
            raise ValueError(f"{name} reads no pictures: leave out {option} (--{option} {given})")
    if sight is None:
        return
    if (taken := setup.pictures * sight.tokens) > setup.length:  # such a row is left out of a run, or stops it
        many = "pictures take" if setup.pictures > 1 else "picture takes"
        raise ValueError(
            f"{setup.pictures} {many} {taken:,} tokens, but a row has {setup.length:,}: "
            "raise length (--max-length), or lower pictures (--pictures)"
        )
    _check_parts(shape, setup)


def _check_parts(shape: "Shape", setup: "Setup") -> None:
    # A tied head is the table of embeddings, which learns with the language model, and no module of its own learns.
    learn = (PROJECTOR, LANGUAGE) if shape.tied else (PROJECTOR, LANGUAGE, HEAD)
    parts = setup.parts or ()
    if unknown := sorted(set(setup.also) - {TOWER, PROJECTOR}):
        raise ValueError(f"also names {', '.join(unknown)}: choose from {TOWER}, {PROJECTOR}")
    if HEAD in parts and shape.tied:
        raise ValueError(f"parts names {HEAD}, but this model's head is its table of embeddings: leave it out")
    if unknown := sorted(set(parts) - set(learn)):
        raise ValueError(f"parts names {', '.join(unknown)}: only training of {', '.join(learn)} can be counted")
    if HEAD in parts and LANGUAGE not in parts:
        raise ValueError(f"parts names {HEAD} without {LANGUAGE}, which is not counted: name both, or neither")
    if both := sorted(set(setup.also) & set(parts)):
        raise ValueError(
            f"{both[0]} is named in both parts and also, but a part cannot learn and be packed: "
            "leave it out of one of them"
        )
    if setup.method == "full" and setup.parts is None:
        raise ValueError(
            f"{shape.name} reads pictures, and what its tower needs to learn cannot be counted: "
            f"say which parts learn, such as --parts {' '.join(learn)}"
        )
