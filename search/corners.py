"""The four corners of the unified operator as variants of a profile: its layers, counts and choice, another operator.

The corners are those of the paper's section 2.7 and Listing 3; merge and pool set the transfer gate wide open by a
sharpness that no similarity can hold against, as the shipped ``tome-style`` and ``pool`` profiles do.
"""

from collections.abc import Mapping

from eos_vllm.core.errors import EosError
from eos_vllm.core.profile import Profile, parse_profile

_OPEN = 1e6
_NEUTRAL = {"gamma": 0.0, "tau": 1.0, "theta": -1.0, "rho": 0.0, "nu": 0.0}
CORNERS: Mapping[str, Mapping[str, float]] = {
    "prune": _NEUTRAL,
    "merge": {**_NEUTRAL, "gamma": 1.0, "tau": 1e-4},
    "pool": {**_NEUTRAL, "gamma": 1.0, "tau": 1e6},
    "reweight": {**_NEUTRAL, "rho": 1.0},
}


def at_corner(profile: Profile, corner: str) -> Profile:
    """The profile with every reducer's operator at a corner (Eq. 15 to 22); reweighting at its full strength.

    Args:
        profile: gives layers, counts, query rule and budget.
        corner: one of ``CORNERS``.

    Raises:
        EosError: no such corner.
    """
    if corner not in CORNERS:
        raise EosError("corner", corner, "this is no corner of the operator", f"choose from {', '.join(CORNERS)}")
    data = profile.to_dict()
    data["operator"]["gate_sharpness"] = _OPEN
    for reducer in data["reducers"]:
        if "withdraw" not in reducer:
            reducer.update(CORNERS[corner])
    label = f"{corner}@{profile.name}"
    return parse_profile(data | {"name": label, "description": "", "provenance": {}}, label)
