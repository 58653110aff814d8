"""Elastic budgets in an engine: whatever was chosen, tokens are the reference's, and blocks are as planned."""

from pathlib import Path
from typing import Any

import pytest

from eos_search.reference import ReferenceModel
from eos_vllm.core.errors import SettingError
from eos_vllm.models.images import sample_image
from support.engines import Ask, BlockWatch, engine, free_blocks, params_of, prompt_of, scheduler_of
from support.profiles import make_profile

RANGE = "32:256"


def settings(llm_settings: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    profile = make_profile().to_dict()
    return {"additional_config": {"eos": {"profile": profile, **options}}, **(llm_settings or {})}


def test_a_burst_gets_smaller_budgets_and_right_answers(tiny_model: Path) -> None:
    asks = [Ask(f"USER: <image>\nWhich one, {i}? ASSISTANT:", [sample_image(900 + i)], max_tokens=8) for i in range(12)]
    asks += [
        Ask("USER: Hello ASSISTANT:", max_tokens=8),
        Ask("USER: <image>\nA? ASSISTANT:", [sample_image(1)], 192, 8),
    ]
    asks.append(Ask("USER: <image>\nAnd again? ASSISTANT:", [sample_image(900)], max_tokens=8))
    with engine(tiny_model, None, **settings(elastic=RANGE, llm_settings={"enable_prefix_caching": True})) as llm:
        before = free_blocks(llm)
        params = [params_of(ask) for ask in asks]
        for one in params[:4]:
            one.extra_args = {"eos_retain_min": 64}
        with BlockWatch(scheduler_of(llm)) as watch:
            outputs = llm.generate([prompt_of(ask) for ask in asks], params, use_tqdm=False)
        assert watch.errors == []
        assert free_blocks(llm) == before
        assert not scheduler_of(llm).chosen
    chosen = [(out.kv_transfer_params or {}).get("eos_retain") for out in outputs]
    assert chosen[12:14] == [None, None]  # no image; a budget of its own
    assert chosen[0] == chosen[14] == 256  # an image that is known keeps its budget
    assert chosen[:4] == sorted(chosen[:4], reverse=True)
    assert min(chosen[:4]) >= 64
    assert chosen[11] == 32
    assert len(set(chosen[:12])) == 4
    reference = ReferenceModel.from_pretrained(str(tiny_model), make_profile(), block=32)
    for ask, out, budget in zip(asks, outputs, chosen, strict=True):
        want = reference.generate(ask.prompt, ask.images, 8, budget or ask.budget)
        assert list(out.outputs[0].token_ids) == want.token_ids


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"elastic": RANGE, "retain": 64}, "eos-retain"),
        ({"elastic": "256:32"}, "floor is not below"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], words: str, tiny_model: Path) -> None:
    with pytest.raises(SettingError, match=words), engine(tiny_model, None, **settings(**options)):
        pass
