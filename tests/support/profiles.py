"""Profiles for the small model of the tests."""

from typing import Any

from eos_vllm.core.profile import Profile, parse_profile


def make_profile(layers: tuple[int, ...] = (1, 3, 5), depth: int = 8, **changes: Any) -> Profile:
    """A profile for the small model; ``changes`` replace fields, ``operator_values`` those of all reducers."""
    values = {"gate": 1.0, "discard": 0.5, "gamma": 0.0, "tau": 0.5, "theta": 0.0, "rho": 0.0, "nu": 0.0}
    values |= changes.pop("operator_values", {})
    data = {
        "schema": "eos-profile/1",
        "name": "test",
        "model": {
            "architecture": "LlavaForConditionalGeneration",
            "num_decoder_layers": depth,
            "visual_tokens": 576,
        },
        "reducers": [{"layer": layer, **values} for layer in layers],
        "budget": {"measure": "final", "tokens": 64},
        **changes,
    }
    return parse_profile(data)
