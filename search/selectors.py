"""What may choose before the decoder, by the names that searches and opponents share."""

from collections.abc import Mapping
from typing import Any

from eos_vllm.core.errors import SettingError
from eos_vllm.core.selectors import SELECTORS, Selector

# Rules that mix tokens themselves leave nothing to the operator.
NAMED: Mapping[str, dict[str, Any]] = {
    "uniform": {"rule": "uniform"},
    "maxmin": {"rule": "maxmin"},
    "mmr": {"rule": "mmr"},
    "coverage": {"rule": "coverage", "score": "uniform"},
    "received": {"rule": "topk", "score": "received_attention"},
    "rarity": {"rule": "topk", "score": "rarity"},
    "cls": {"rule": "topk", "score": "cls_attention"},
}


def named_selector(name: str | None) -> Selector | None:
    """The selector of a name in :data:`NAMED`; None for None.

    Raises:
        SettingError: no such name.
    """
    if name is None:
        return None
    if name not in NAMED:
        raise SettingError("select", name, "no selector has this name", f"choose from {', '.join(NAMED)}")
    fields = dict(NAMED[name])
    return SELECTORS[fields.pop("rule")](**fields)
