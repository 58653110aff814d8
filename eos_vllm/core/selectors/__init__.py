"""Selectors of a reducer before the language model (``layer: -1``), one method per file.

A selector decides which patches become anchors; what the discarded ones do to them is the unified operator's part.
"""

from typing import Annotated

from pydantic import Field

from eos_vllm.core.selectors.base import Choice, Selector
from eos_vllm.core.selectors.coverage import Coverage
from eos_vllm.core.selectors.fixed import Random, Uniform
from eos_vllm.core.selectors.maxmin import MaxMin
from eos_vllm.core.selectors.mmr import MMR
from eos_vllm.core.selectors.prumerge_plus import PruMergePlus
from eos_vllm.core.selectors.resize import Resize
from eos_vllm.core.selectors.topk import TopK
from eos_vllm.core.selectors.tower import LAST, QueriesAndKeys, TowerOutput
from eos_vllm.core.selectors.visionzip import VisionZip
from eos_vllm.core.selectors.visprune import VisPrune
from eos_vllm.core.selectors.window_topk import WindowTopK

AnySelector = Annotated[
    TopK | VisionZip | WindowTopK | VisPrune | MaxMin | Coverage | MMR | PruMergePlus | Random | Uniform | Resize,
    Field(discriminator="rule"),
]
SELECTORS: dict[str, type[Selector]] = {
    kind.model_fields["rule"].default: kind
    for kind in (TopK, VisionZip, WindowTopK, VisPrune, MaxMin, Coverage, MMR, PruMergePlus, Random, Uniform, Resize)
}

__all__ = ["LAST", "SELECTORS", "AnySelector", "Choice", "QueriesAndKeys", "Selector", "TowerOutput"]
