"""Digests of profiles: what they are of, and how a source is held to one."""

import json
from pathlib import Path

import pytest
from unit_builders import profile_data

from eos_vllm import profiles
from eos_vllm.core.errors import ProfileError
from eos_vllm.core.profile import parse_profile, profile_digest
from eos_vllm.serving.sources import load_profile

NAME = "sparsevlm-v2-llava-1.5-7b"


def test_a_pinned_profile_is_loaded_wherever_it_is(tmp_path: Path) -> None:
    want = profile_digest(profiles.load(NAME))
    file = tmp_path / "theta.json"
    # Another layout and order of fields are the same profile.
    file.write_text(json.dumps(dict(reversed(profiles.load(NAME).to_dict().items())), indent=7))
    for source in (NAME, str(file)):
        assert load_profile(f"{source}@{want}") == profiles.load(NAME)
        assert load_profile(f"{source}@{want.upper().replace('SHA256', 'sha256')}") == profiles.load(NAME)


def test_another_profile_is_refused_with_both_digests(tmp_path: Path) -> None:
    file = tmp_path / "theta.json"
    file.write_text(json.dumps(profile_data(name="other")))
    found = profile_digest(parse_profile(profile_data(name="other")))
    with pytest.raises(ProfileError, match=found) as error:
        load_profile(f"{file}@{profile_digest(profiles.load(NAME))}")
    assert "\n" not in str(error.value)
    with pytest.raises(ProfileError, match="has the digest"):
        load_profile(f"{NAME}@sha256:")
