"""Every shipped profile for LLaVA-1.5 loads, plans and serves: on a small model of LLaVA-1.5-7B's depth.

Those for other architectures are of depths that no small model here has; test_families.py serves such models.
"""

from pathlib import Path

import pytest

from eos_search.reference import ReferenceModel
from eos_vllm import profiles
from eos_vllm.models.images import sample_image
from eos_vllm.models.tiny import write_tiny_model
from support.engines import Ask, BlockWatch, answer_all, engine, scheduler_of


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("deep") / "model", num_decoder_layers=32, vision_layers=8)


LLAVA = "LlavaForConditionalGeneration"
# Of a model with random weights the last bit of the tower's output can decide what these choose.
UNSTABLE = ("coverage", "visprune")


def served() -> list[str]:
    """Those of LLaVA-1.5 that reduce within the decoder; each selector alone has its test beside this one."""
    shipped = {name: profiles.load(name) for name in profiles.names()}
    return [name for name, profile in shipped.items() if profile.inside and profile.model.architecture == LLAVA]


@pytest.mark.parametrize("name", served())
def test_shipped_profile(name: str, deep_model: Path, tiny_model: Path) -> None:
    profile = profiles.load(name)
    model = deep_model if profile.model.num_decoder_layers == 32 else tiny_model
    budgets = [None, *(int(budget) for budget in list(profile.schedules)[:2])]
    asks = [
        Ask(f"USER: <image>\nWhich one, {i}? ASSISTANT:", [sample_image(70 + i)], b, 8) for i, b in enumerate(budgets)
    ]
    reference = ReferenceModel.from_pretrained(str(model), profile, block=32)
    with engine(model, profile) as llm, BlockWatch(scheduler_of(llm)) as watch:
        answers = answer_all(llm, asks)
    assert watch.errors == []
    assert watch.reduced > 0
    for ask, answer in zip(asks, answers, strict=True):
        if profile.selector is not None and profile.selector.rule in UNSTABLE:
            assert len(answer.token_ids) == 8
            continue
        assert answer.token_ids == reference.generate(ask.prompt, ask.images, 8, ask.budget).token_ids
