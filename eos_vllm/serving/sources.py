"""Where ``--eos-profile`` may point: a file, the name of a shipped profile, an https URL or a hub repository."""

import http.client
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from eos_vllm import profiles
from eos_vllm.core.errors import ProfileError
from eos_vllm.core.profile import MAX_BYTES, Profile, parse_profile, profile_digest, read_profile

HUB_FILE = "theta.json"
_FETCH_SECONDS = 30
_PIN = "@sha256:"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_REMEDY = f"give a file, an https:// URL, a hub repo id holding {HUB_FILE}, or a name of `eos-vllm profile list`"


def load_profile(source: Any) -> Profile:
    """Reads a profile from wherever ``source`` points, and validates it.

    Args:
        source: path, shipped name, ``https://`` URL, hub id ``owner/name[@revision]``, or the plain data; text may
            end in ``@sha256:…``, the digest that `eos-vllm profile show` prints.

    Raises:
        ProfileError: nothing there, unreachable, invalid, or of another digest.
    """
    if isinstance(source, dict):
        return parse_profile(source, "additional_config.eos.profile")
    if not isinstance(source, str) or not source:
        raise ProfileError("eos-profile", source, "this names no profile", _REMEDY)
    if _PIN in source:
        name, _, pinned = source.rpartition(_PIN)
        profile = load_profile(name)
        if (found := profile_digest(profile)) != f"sha256:{pinned.lower()}":
            remedy = "give the digest of the profile that you have looked at, or leave it out"
            raise ProfileError("eos-profile", source, f"{name} has the digest {found}", remedy)
        return profile
    if source.startswith("https://"):
        return parse_profile(_fetch(source), source)
    if "://" in source:
        raise ProfileError("eos-profile", source, "only https:// is fetched", _REMEDY)
    path = Path(source).expanduser()
    if path.exists():
        return read_profile(path)
    if source in profiles.names():
        return profiles.load(source)
    if _HUB_ID.fullmatch(source) and path.suffix != ".json":
        return read_profile(_from_hub(source))
    raise ProfileError("eos-profile", source, "there is no such file", _REMEDY)


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_FETCH_SECONDS) as response:
            if not response.geturl().startswith("https://"):
                raise ProfileError("eos-profile", url, "it redirects away from https", _REMEDY)
            return response.read(MAX_BYTES + 1)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as e:
        if isinstance(e, ProfileError):
            raise
        reason = getattr(e, "reason", None) or e
        raise ProfileError("eos-profile", url, f"it cannot be fetched ({reason})", _REMEDY) from None


def _from_hub(repo: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = repo.partition("@")
    try:
        return hf_hub_download(name, HUB_FILE, revision=revision or None)
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ProfileError("eos-profile", repo, f"no file of this name, nor on the hub ({reason})", _REMEDY) from None
