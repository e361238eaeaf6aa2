"""Compare the packages of this environment with what the library requires.

In: nothing but the environment. Out: the requirements that are not met. The list is that of pyproject.toml, as the
installed distribution repeats it. Only metadata are read: a package that cannot be imported is found as well.
"""

from importlib.metadata import PackageNotFoundError, metadata, version
from typing import NamedTuple

DISTRIBUTION = "qlora-lab"


class Unmet(NamedTuple):
    """A requirement that is not met. installed: the version that is there instead, or None."""

    name: str
    requirement: str  # as pip takes it, such as "ipywidgets>=8.1.5"
    installed: str | None


def required() -> list[tuple[str, str]]:
    """Return (name, requirement) of each package that the library needs on this system, without extras.

    Raises PackageNotFoundError where the library is imported from a folder and was never installed.
    """
    from packaging.requirements import Requirement

    lines = map(Requirement, metadata(DISTRIBUTION).get_all("Requires-Dist") or ())
    # "" for the extra: a requirement of an extra has a marker that names it
    here = [line for line in lines if line.marker is None or line.marker.evaluate({"extra": ""})]
    return [(line.name, f"{line.name}{line.specifier}") for line in here]


def unmet() -> list[Unmet]:
    """Return what is missing or too old. Raises as `required` does."""
    from packaging.requirements import Requirement

    found = []
    for name, requirement in required():
        installed = _installed(name)
        # a release candidate of the right version counts: rooms have what their images have
        if installed is None or not Requirement(requirement).specifier.contains(installed, prereleases=True):
            found.append(Unmet(name, requirement, installed))
    return found


def required_python() -> str:
    """Return the versions of Python that the library allows, such as ">=3.11". Raises as `required` does."""
    return metadata(DISTRIBUTION)["Requires-Python"]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
