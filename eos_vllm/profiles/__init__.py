"""The profiles that come with the package: published methods, and starting points for the embedded model.

Each file's ``description`` says where it comes from, what of it is exact, and what a profile cannot express.
"""

from pathlib import Path

from eos_vllm.core.errors import ProfileError
from eos_vllm.core.profile import Profile, read_profile

_HERE = Path(__file__).parent


def names() -> tuple[str, ...]:
    """Names of the shipped profiles, sorted; each is what ``--eos-profile`` takes."""
    return tuple(sorted(file.stem for file in _HERE.glob("*.json")))


def path(name: str) -> Path:
    """File of the shipped profile ``name``.

    Raises:
        ProfileError: there is none of this name.
    """
    if name not in names():
        remedy = "give a path, or a name of `eos-vllm profile list`"
        raise ProfileError("profile", name, "neither a file nor a shipped profile", remedy)
    return _HERE / f"{name}.json"


def load(name: str) -> Profile:
    """The shipped profile ``name``; errors as in :func:`path`."""
    return read_profile(path(name))


def resolve(source: str) -> Profile:
    """A profile by path or by shipped name; a file of that path wins, as it does in ``--eos-profile``.

    Raises:
        ProfileError: neither, or the file is invalid.
    """
    file = Path(source).expanduser()
    return read_profile(file) if file.exists() else load(source)
