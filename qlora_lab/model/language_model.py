"""Tell the language model of a model that sees from what stands beside it: a vision tower and a projector.

In: any model. Out: paths. The language model is the module whose configuration is the text part of the model's, which
get_text_config of transformers names; no list of families is needed. In a model of text that is the whole model.

    LLaVA: model.vision_tower -> model.multi_modal_projector -> model.language_model -> lm_head
"""

from collections.abc import Iterable

from torch import nn


def language_model(model: nn.Module) -> str:
    """Return the path of the language model without its head; "" if that is the whole model."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is config:
        return ""
    # Layers keep their configuration, too: the first module in the model's order is the one around them.
    return next((path for path, module in model.named_modules() if getattr(module, "config", None) is text), "")


def beside(model: nn.Module) -> set[str]:
    """Return paths of all modules that are neither in the language model nor around it, the head among them."""
    inside = language_model(model)
    if not inside:
        return set()
    return {path for path, _ in model.named_modules() if not f"{path}.".startswith(f"{inside}.")} - _around(inside)


def parts_beside(model: nn.Module, paths: Iterable[str]) -> dict[str, set[str]]:
    """Return name of a part -> those of `paths` in it, for the parts beside the language model, such as vision_tower.

    A part stands where the language model stands, so its name is what comes after the path of their parent.
    """
    parent = language_model(model).rpartition(".")[0]
    found: dict[str, set[str]] = {}
    for path in sorted(beside(model) & set(paths)):
        name = path.removeprefix(f"{parent}.").split(".")[0]
        found.setdefault(name, set()).add(path)
    return found


def chosen_parts(model: nn.Module, names: Iterable[str], paths: Iterable[str]) -> set[str]:
    """Return those of `paths` that lie in the named parts. Raises ValueError for a name without any, with the names."""
    parts = parts_beside(model, paths)
    for name in names:
        if name not in parts:
            choices = f"choose from {', '.join(parts)}" if parts else "leave it out"
            raise ValueError(f"{name!r} is not a part with linear layers beside the language model: {choices}")
    return {path for name in names for path in parts[name]}


def as_names(names: str | Iterable[str], option: str = "also") -> tuple[str, ...]:
    """Return names as a tuple, each once; a text is one name. Raises TypeError, with the option, for anything else."""
    named = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, Iterable) else (names,)
    if not all(isinstance(name, str) for name in named):
        raise TypeError(f"{option} is {names!r:.60}, but it must be a name or a list of names")
    return tuple(dict.fromkeys(named))


def _around(path: str) -> set[str]:
    """Return "", "model", ... for "model.language_model": the modules that hold the language model."""
    names = path.split(".")
    return {".".join(names[:count]) for count in range(len(names))}
