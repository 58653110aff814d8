"""What a search's start is worth at every place: its only reducer behind each layer in turn, by the hard loss."""

from dataclasses import replace
from typing import Any

import torch

from eos_search.data import load_data
from eos_search.examples import Broken, Encoder
from eos_search.frozen import load_frozen
from eos_search.moves import Move, moved
from eos_search.objective import penalties
from eos_search.process import deterministic
from eos_search.relaxed import Relaxation, RelaxedModel
from eos_search.settings import SearchSettings
from eos_search.space import search_space
from eos_search.structure import places, read_structure
from eos_search.task import EncodedRows, ModelTask
from eos_vllm.core.errors import SettingError

ROWS = 64
# Not a seed of the searches: other rows of the same split.
SEED = 1_000_003


@torch.no_grad()
def loss_by_place(settings: SearchSettings, rows: int = ROWS) -> list[dict[str, Any]]:
    """Mean task loss and its standard error over ``rows`` of the search's data, and the penalties, by layer.

    Args:
        settings: of a search whose placement is one layer; operator, gate and discard are those of its start.
        rows: of the data, drawn anew.

    Raises:
        SettingError: more than one layer acts at the start, or rows that cannot be read.
    """
    if settings.placement is None or len(settings.placement) != 1:
        told = None if settings.placement is None else list(settings.placement)
        raise SettingError("placement", told, "one layer is put at every place", "give one")
    drawn = settings.model_copy(update={"samples": rows, "seed": SEED})
    with deterministic():
        frozen = load_frozen(drawn, torch.device("cpu"))
        objective, rules, theta = search_space(drawn, frozen.spec)
        encoder = Encoder(frozen.processor, drawn.prompt, drawn.answer, objective.visual_tokens, drawn.max_tokens)
        data = EncodedRows(load_data(drawn, encoder), encoder)
        examples = [data[i] for i in range(len(data))]
        if broken := [example for example in examples if isinstance(example, Broken)]:
            raise SettingError("data", broken[0].id, broken[0].problem, "mend this row")
        model = RelaxedModel(frozen.model, rules, Relaxation(explore=False))
        task = ModelTask(model, objective, objective.visual_tokens, settings.cache_mib << 20)
        start = theta()
        found = []
        for layer in places(start.depth, rules):
            values = replace(start, table=moved(start.table, Move(settings.placement[0], layer)))
            hard = read_structure(values, rules)
            losses = torch.stack([task(example, values, hard).total for example in examples]).double()  # type: ignore[arg-type]
            pull = penalties(objective, values, hard.acting)
            found.append(
                {
                    "layer": layer,
                    "kept": list(hard.counts),
                    "cost": round(pull.tokens.item(), 1),
                    "task": round(losses.mean().item(), 4),
                    "error": round((losses.std() / len(losses) ** 0.5).item(), 4),
                    "penalty": round((pull.budget + pull.cost).item(), 4),
                }
            )
    return found
