"""Pictures beside the texts of an example: their files, the tokens that keep their places, and their numbers.

In: paths of image files, and texts with `<image>` where each picture stands, as LLaVA's data files have it.
Out: texts in which each `<image>` is what the model's processor writes for that picture, one token for each patch that
the language model gets; and for a batch `pixel_values`, (pictures, channels, height, width) float32, and whatever else
the processor gives.

A picture of another size than the tower takes is resized by the processor, as its folder says. Files are read when they
are needed and not kept: 10,000 pictures of 336 x 336 would take 13 GB. So an example holds a checksum of each.
Source: LLaVA (arXiv 2304.08485), section 4; processors of transformers.
"""

import hashlib
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_lab.data.fields import is_empty

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase as Tokenizer, ProcessorMixin

PLACEHOLDER = "<image>"
FIELDS = ("image", "images")  # of a record: a path, or a list of paths
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of others, Pillow starts Ghostscript for EPS
LARGEST = 256 << 20  # bytes of a file, of which all are read: more than any picture of so many pixels needs
PIXELS = 89_478_485  # where Pillow begins to warn: a file of a few kilobytes can claim more than the memory holds
TEXT_INPUTS = ("input_ids", "attention_mask")
TYPES = "token_type_ids"  # the end of a name: tells which tokens are pictures, for models that see them both ways
Turns = tuple[tuple[str, str], ...]  # as in examples.py, which imports this file
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # name -> shape of a tensor


@dataclass(frozen=True)
class Picture:
    """An image file, as it was when the example was encoded."""

    path: Path
    sha256: str  # of the file
    processor: "ProcessorMixin" = field(compare=False, repr=False)
    shapes: "Shapes" = field(compare=False, repr=False)  # of what the processor makes of it

    def inputs(self) -> "dict[str, torch.Tensor]":
        """Read the file and return what the processor makes of it. Raises ValueError if the file has changed."""
        content, image = _read(self.path)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ValueError(f"{self.path} has changed since it was first read: put the picture back, or start anew")
        return _processed(self.processor, image)


def picture_paths(record: Mapping, folder: Path) -> tuple[Path, ...]:
    """Return the paths that a record names, relative ones from `folder`. Raises ValueError for anything else.

    folder: of the data file; the current one for records that are in no file. The pictures are not opened yet.
    """
    filled = [name for name in FIELDS if not is_empty(record.get(name))]
    if len(filled) > 1:
        raise ValueError("the record has 'image' and 'images': keep one of them")
    if not filled:
        return ()
    named = record[filled[0]]
    paths = named if isinstance(named, list) else [named]
    for path in paths:
        if not isinstance(path, (str, Path)) or not str(path) or "\0" in str(path):
            raise ValueError(f"{filled[0]!r} must be the path of an image file, or a list of them, found {path!r:.60}")
    return tuple(folder / path for path in paths)


def check_placeholders(messages: Turns, pictures: Sequence[Path], whole: str = "the record") -> None:
    """Raise ValueError unless the texts hold `<image>` once for each picture, and not in an answer.

    whole: what has these texts and pictures, as the error calls it.
    """
    if not pictures:
        return  # without pictures it is a text like any other
    places = sum(text.count(PLACEHOLDER) for _, text in messages)
    if places != len(pictures):
        count = f"{len(pictures)} picture{'s' * (len(pictures) > 1)}"
        has = f"{count}, but {PLACEHOLDER} {places} time{'s' * (places != 1)}"
        raise ValueError(f"{whole} has {has}: write {PLACEHOLDER} in a question where each picture stands")
    if any(PLACEHOLDER in text for role, text in messages if role == "assistant"):
        raise ValueError(f"an answer holds {PLACEHOLDER}, but pictures are not learned: write it in a question")


def expanded(
    messages: Turns, paths: Sequence[Path], tokenizer: "Tokenizer"
) -> tuple[Turns, tuple[Picture, ...], frozenset[str]]:
    """Return the messages with each `<image>` written out, the pictures, and the control tokens that this takes.

    Raises ValueError for a model that reads no pictures, a file that is not a picture, a text that spells one of those
    tokens itself, and `<image>` without a picture.
    """
    processor = getattr(tokenizer, "processor", None)
    if processor is None:
        if paths:
            reason = "the tokenizer has no processor: load a model that sees, from a folder with processor_config.json"
            raise ValueError(f"there are pictures, but {reason}")
        return messages, (), frozenset()
    if not paths:
        if any(PLACEHOLDER in text for _, text in messages):
            where = "in 'image' of a record, or in `pictures` of `generate`"
            raise ValueError(f"a text holds {PLACEHOLDER}, but no picture is named: name it {where}")
        return messages, (), frozenset()
    pictures = []
    texts = []
    for path in paths:
        content, image = _read(path)
        text, shapes = _of_size(processor, image.size)
        pictures.append(Picture(path, hashlib.sha256(content).hexdigest(), processor, shapes))
        texts.append(text)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    marks = frozenset(token for token in special if any(token in text for text in texts))
    for _, text in messages:
        if spelt := sorted(mark for mark in marks if mark in text.replace(PLACEHOLDER, "")):
            raise ValueError(f"a text spells {spelt[0]!r}, which stands for a part of a picture: leave it out")
    rest = iter(texts)
    return tuple((role, _filled(text, rest)) for role, text in messages), tuple(pictures), marks


def _filled(text: str, written: Iterable[str]) -> str:
    first, *others = text.split(PLACEHOLDER)
    return first + "".join(next(written) + other for other in others)


def picture_inputs(rows: Iterable[Sequence[Picture]], input_ids: "torch.Tensor") -> "dict[str, torch.Tensor]":
    """Return what a model gets beside the texts of a batch; nothing without pictures.

    rows: pictures of each row, in the order of the batch. input_ids: (rows, longest) int64. Raises ValueError for
    pictures whose tensors cannot be joined.
    """
    import torch  # heavy, and the command line reads this file for its options

    pictures = [picture for row in rows for picture in row]
    read = [picture.inputs() for picture in pictures]
    batch: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(name for inputs in read for name in inputs):
        tensors = [inputs[name] for inputs in read]
        if name.endswith(TYPES):  # 1 where a token is a picture's; the tokens are the same for all
            own = torch.cat([inputs["input_ids"][inputs[name] == 1] for inputs in read]).unique()
            batch[name] = torch.isin(input_ids, own).long()
        elif name not in TEXT_INPUTS:
            differing = (
                p for p, tensor in zip(pictures, tensors, strict=True) if tensor.shape[1:] != tensors[0].shape[1:]
            )
            if odd := next(differing, None):
                raise ValueError(
                    f"{pictures[0].path} and {odd.path} become {name} of different shapes: make them alike"
                )
            batch[name] = torch.cat(tensors)  # (pictures, ...)
    return batch


@lru_cache(maxsize=256)  # processing takes milliseconds, and data sets have few sizes
def _of_size(processor: "ProcessorMixin", size: tuple[int, int]) -> tuple[str, Shapes]:
    """Return the text that stands for a picture of this size, and the shapes of its tensors.

    Both depend on nothing else, so a blank picture tells them.
    """
    from PIL.Image import new

    tokenizer = processor.tokenizer
    inputs = _processed(processor, new("RGB", size))
    control = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    # Token by token, because decoding would put spaces between control tokens of some tokenizers.
    text = "".join(control.get(i) or tokenizer.decode([i]) for i in inputs["input_ids"][0].tolist())
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in inputs.items() if name not in TEXT_INPUTS)
    return text, shapes


def _processed(processor: "ProcessorMixin", image: "Image") -> "dict[str, torch.Tensor]":
    token = getattr(processor, "image_token", PLACEHOLDER)  # what its own templates write for a picture
    try:
        made = processor(images=[image], text=[token], add_special_tokens=False, return_tensors="pt")
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # it is somebody's program
        size = f"a picture of {image.width} x {image.height}"
        raise ValueError(f"{type(processor).__name__} cannot process {size}: {' '.join(str(error).split())}") from None
    return dict(made)


def _read(path: Path) -> "tuple[bytes, Image]":
    """Return the bytes and the picture of a file, upright. Raises ValueError if it is missing, or not a picture.

    Also for a file above LARGEST, a picture above PIXELS, and one whose numbers no rule maps to 8 bits.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if not path.is_file():
            raise ValueError(f"no picture at {path}: name it from the folder of the data file")
        if (size := path.stat().st_size) > LARGEST:
            raise ValueError(f"{path} has {size:,} bytes, but a picture has at most {LARGEST:,}: save a smaller one")
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused by name below
            with Image.open(BytesIO(content), formats=FORMATS) as image:
                refused = _refusal(image)
                if not refused:
                    return content, _as_rgb(image)  # decodes all of it, so a file that is cut off fails here
    except UnidentifiedImageError:  # its message names an object in memory
        refused = f"is not a picture (in none of {', '.join(FORMATS)}): put a whole one in its place"
    except Image.DecompressionBombError:  # from twice as many on, before there is an image
        refused = f"has more than {PIXELS:,} pixels: make it smaller"
    except (OSError, SyntaxError, ValueError, struct.error) as error:  # Pillow's, for damaged files
        reason = f"{' '.join(str(error).split()):.80}"
        refused = f"is not a picture ({reason}): put a whole one in its place"
    raise ValueError(f"{path} {refused}")


def _refusal(image: "Image") -> str:
    """Say what forbids to use a picture that Pillow has opened but not decoded; "" if nothing does."""
    if image.width * image.height > PIXELS:
        return f"has more than {PIXELS:,} pixels: make it smaller"
    # Their range is unknown, and Pillow clips it at 255: a white picture.
    if image.mode in ("I", "F") and not _has_16_bits(image):
        return f"has 32 bits a channel (Pillow's mode {image.mode}): save it with 8 bits a channel"
    return ""


def _has_16_bits(image: "Image") -> bool:
    """Whether white is 65535. Pillow also brings a PGM of more than 8 bits to this range, whatever its own maximum."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _as_rgb(image: "Image") -> "Image":
    """Return the picture with 8 bits a channel, turned as its EXIF data say, which load_image of transformers does."""
    import numpy as np  # heavy, see picture_inputs
    from PIL import Image, ImageOps

    if _has_16_bits(image):
        # Pillow would clip at 255, so all but the darkest would be white. 65535 / 257 = 255.
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257  # (height, width)
        scaled = Image.fromarray(grey.astype(np.uint8))
        scaled.info = image.info  # EXIF data lie there
        image = scaled
    return ImageOps.exif_transpose(image).convert("RGB")
