"""Families of models: what is refused at start, how Qwen's positions are numbered, how OneVision's rows end."""

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from eos_vllm.core.errors import SettingError
from eos_vllm.core.plan import ImageSpan
from eos_vllm.core.profile import parse_profile
from eos_vllm.core.selectors.fixed import Uniform
from eos_vllm.models.image_sizes import image_tokens
from eos_vllm.serving.hosts import FAMILIES, host_of, model_classes
from eos_vllm.serving.model_facts import most_tokens
from eos_vllm.serving.options import planner_of
from eos_vllm.serving.plan_endpoint import size_counter
from support.families import build
from support.flags import configure, refused

DEPTH = 6
PRUNE = {"gate": 1.0, "discard": 0.5, "gamma": 0.0, "tau": 1.0, "theta": 0.0, "rho": 0.0, "nu": 0.0}
LIMITS = ["--limit-mm-per-prompt", json.dumps({"image": 2, "video": 0})]


def profile_of(architecture: str, **changes: Any) -> dict[str, Any]:
    return {
        "schema": "eos-profile/2",
        "name": "host",
        "model": {"architecture": architecture, "num_decoder_layers": DEPTH, "visual_tokens": None},
        "reducers": [{"layer": 1, **PRUNE}],
        "budget": {"measure": "final", "share": 0.5},
        **changes,
    }


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    written: dict[str, Path] = {}

    def model(family: str) -> Path:
        if family not in written:
            written[family] = build.write(family, tmp_path_factory.mktemp(family))
        return written[family]

    return model


def flags(tmp_path: Path, profile: dict[str, Any]) -> list[str]:
    file = tmp_path / "theta.json"
    file.write_text(json.dumps(profile), encoding="utf-8")
    return ["--eos-profile", str(file), *LIMITS]


def test_every_family_has_a_class_and_a_builder() -> None:
    built = {family.architecture for family in build.FAMILIES.values()}
    assert built == set(FAMILIES)
    for path in model_classes().values():
        module, _, name = path.partition(":")
        assert hasattr(__import__(module, fromlist=[name]), name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": {"architecture": "LlavaForConditionalGeneration", "num_decoder_layers": 6}
             | {"visual_tokens": None}},
            ("profile.model.architecture", "Qwen2_5_VLForConditionalGeneration"),
        ),
        (
            {"model": {"architecture": build.FAMILIES["qwen2.5-vl"].architecture, "num_decoder_layers": 28}
             | {"visual_tokens": None}},
            ("profile.model.num_decoder_layers=28", "the model has 6"),
        ),
        (
            {"model": {"architecture": build.FAMILIES["qwen2.5-vl"].architecture, "num_decoder_layers": 6}
             | {"visual_tokens": 576}, "budget": {"measure": "final", "tokens": 64}},
            ("profile.model.visual_tokens=576", "images of any size"),
        ),
        (
            {"reducers": [{"layer": -1, "select": {"rule": "topk"}, **PRUNE}]},
            ("profile.reducers.0.select='topk'", "uniform, random, maxmin"),
        ),
        (
            {"reducers": [{"layer": 1, **PRUNE}, {"layer": 3, "withdraw": True}]},
            ("block-size", "--eos-exact-counts"),
        ),
    ],
)  # fmt: skip
def test_a_profile_of_another_model_is_refused_in_one_line(
    changes: dict[str, Any], words: tuple[str, ...], model_of: Any, tmp_path: Path, capsys: Any
) -> None:
    architecture = build.FAMILIES["qwen2.5-vl"].architecture
    line = refused(model_of("qwen2.5-vl"), flags(tmp_path, profile_of(architecture, **changes)), capsys)
    assert [word for word in words if word not in line] == []


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(SettingError, match="serve one of LlavaForConditionalGeneration"):
        host_of(SimpleNamespace(architectures=["MllamaForConditionalGeneration"], model="x"))


@pytest.mark.parametrize("limits", [{"video": 1}, {"video": {"count": 2}}])
def test_videos_that_are_asked_for_are_refused(limits: Any, model_of: Any, tmp_path: Path, capsys: Any) -> None:
    architecture = build.FAMILIES["qwen2.5-vl"].architecture
    profile = flags(tmp_path, profile_of(architecture))[:2]
    line = refused(model_of("qwen2.5-vl"), [*profile, "--limit-mm-per-prompt", json.dumps(limits)], capsys)
    assert "limit-mm-per-prompt.video" in line


@pytest.mark.parametrize("family", ["llava-onevision", "qwen2.5-vl", "qwen3-vl"])
def test_videos_are_off(family: str, model_of: Any, tmp_path: Path) -> None:
    profile = flags(tmp_path, profile_of(build.FAMILIES[family].architecture))[:2]
    config = configure(model_of(family), profile)
    assert config.model_config.multimodal_config.get_limit_per_prompt("video") == 0
    assert config.model_config.multimodal_config.get_limit_per_prompt("image") == 999


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--pipeline-parallel-size", "2"], "later stages would not know"),
        (["--video-pruning-rate", "0.5"], "numbers positions anew"),
    ],
)
def test_what_a_selection_cannot_go_with_is_refused(
    more: list[str], words: str, model_of: Any, tmp_path: Path, capsys: Any
) -> None:
    selecting = {"reducers": [{"layer": -1, "select": {"rule": "uniform"}, **PRUNE}]}
    profile = profile_of(build.FAMILIES["qwen2.5-vl"].architecture, **selecting)
    assert words in refused(model_of("qwen2.5-vl"), [*flags(tmp_path, profile), *more], capsys)


@pytest.mark.parametrize("family", ["llava-next", "llava-onevision"])
def test_images_that_end_in_text_do_not_ask_themselves(family: str, model_of: Any, tmp_path: Path, capsys: Any) -> None:
    profile = profile_of(build.FAMILIES[family].architecture, importance={"queries": "image"})
    assert "profile.importance.queries='image'" in refused(model_of(family), flags(tmp_path, profile), capsys)


def test_tokens_that_the_largest_image_cannot_go_down_to_are_refused(
    model_of: Any, tmp_path: Path, capsys: Any
) -> None:
    budget = {"measure": "layer_average", "share": 0.6}
    profile = flags(tmp_path, profile_of(build.FAMILIES["qwen2.5-vl"].architecture, budget=budget))
    line = refused(model_of("qwen2.5-vl"), [*profile, "--eos-retain", "40"], capsys)
    assert "cannot go below" in line


def test_a_step_is_as_long_as_the_largest_image(model_of: Any, tmp_path: Path) -> None:
    profile = flags(tmp_path, profile_of(build.FAMILIES["llava-onevision"].architecture))
    config = configure(model_of("llava-onevision"), profile)
    assert config.scheduler_config.max_num_batched_tokens >= config.additional_config["eos"]["example"] + 64


def test_images_of_equal_pixels_and_unequal_size_are_not_mixed_up() -> None:
    from eos_vllm.core.selectors import TowerOutput
    from eos_vllm.serving.row_selection import RowSelection

    selection = object.__new__(RowSelection)
    selection.choices, selection.selector = OrderedDict(), Uniform()
    for total in (40, 30):
        tower = TowerOutput(torch.randn(1, total, 4), lambda rows: rows)
        assert int(selection._choose(tower, 10, [7]).max()) < total
    assert len(selection.choices) == 2


def test_places_that_no_forward_pass_took_end_the_engine() -> None:
    host = TestNumbering.host(eos_before=object(), eos_moved=(torch.ones(1), torch.zeros(1, 2)))
    with pytest.raises(RuntimeError, match="replayed or replaced"):
        host.embed_input_ids(torch.zeros(1), [torch.zeros(1, 5)], is_multimodal=torch.ones(1, dtype=torch.bool))


def test_videos_and_embeddings_that_get_past_the_limits_are_refused() -> None:
    """``--enable-mm-embeds`` lets embeddings through where the limit is 0."""
    from vllm.multimodal.parse import ImageEmbeddingItems

    from eos_vllm.serving.image_processor import EosProcessorMixin

    processor = object.__new__(EosProcessorMixin)
    processor.planner, processor.selects = SimpleNamespace(image_token=7), False
    for items, words in (
        ({"video": ["v"]}, "takes no videos"),
        ({"image": object.__new__(ImageEmbeddingItems)}, "image_embeds"),
    ):
        with pytest.raises(ValueError, match=words):
            processor.apply(SimpleNamespace(mm_data_items=items, hf_processor_mm_kwargs={}))


def test_a_graph_of_the_vision_tower_is_refused_where_selection_follows(
    model_of: Any, tmp_path: Path, capsys: Any
) -> None:
    selecting = {"reducers": [{"layer": -1, "select": {"rule": "uniform"}, **PRUNE}]}
    profile = profile_of(build.FAMILIES["qwen2.5-vl"].architecture, **selecting)
    more = ["--compilation-config", json.dumps({"cudagraph_mm_encoder": True})]
    assert "cudagraph_mm_encoder" in refused(model_of("qwen2.5-vl"), [*flags(tmp_path, profile), *more], capsys)


def test_a_onevision_that_tiles_otherwise_is_refused(model_of: Any, tmp_path: Path, capsys: Any) -> None:
    source, copy = model_of("llava-onevision"), tmp_path / "model"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vision_aspect_ratio": "anyres_max_4"}))
    line = refused(copy, flags(tmp_path, profile_of(build.FAMILIES["llava-onevision"].architecture)), capsys)
    assert "vision_aspect_ratio='anyres_max_4'" in line


@pytest.mark.parametrize("family", ["llava-next", "llava-onevision", "qwen2.5-vl", "qwen3-vl"])
def test_the_largest_image_and_the_image_token_reach_every_process(family: str, model_of: Any, tmp_path: Path) -> None:
    config = configure(model_of(family), flags(tmp_path, profile_of(build.FAMILIES[family].architecture)))
    planner = planner_of(config)
    assert planner is not None
    assert planner.visual_tokens == config.additional_config["eos"]["example"] > 64
    assert (planner.image_token is not None) == (family in ("llava-next", "llava-onevision"))


@pytest.mark.parametrize("family", ["llava-next", "llava-onevision", "qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize("size", [(112, 84), (336, 224), (75, 230), (420, 308)])
def test_the_model_is_asked_for_the_tokens_of_an_image(family: str, size: tuple[int, int], model_of: Any) -> None:
    """As many as vLLM puts into a prompt."""
    from transformers import AutoProcessor

    from eos_vllm.models.images import sample_image

    path, chat = model_of(family), build.FAMILIES[family].chat
    processor = AutoProcessor.from_pretrained(path)
    inputs = processor(text=[chat.ask("[I]?")], images=[sample_image(0).resize(size)], return_tensors="pt")
    config = json.loads((path / "config.json").read_text())
    token = config.get("image_token_id", config.get("image_token_index"))
    assert image_tokens(path, *size) == int((inputs["input_ids"] == token).sum())


@pytest.mark.parametrize("family", ["llava-next", "llava-onevision", "qwen2.5-vl", "qwen3-vl"])
def test_plans_count_an_image_s_tokens_as_the_server_does(family: str, model_of: Any, tmp_path: Path) -> None:
    path = model_of(family)
    given = flags(tmp_path, profile_of(build.FAMILIES[family].architecture))
    count = size_counter(configure(path, given).model_config)
    sizes = [(112, 84), (336, 224), (75, 230), (420, 308)]
    assert [count(*size) for size in sizes] == [image_tokens(path, *size) for size in sizes]
    if not family.startswith("qwen"):
        return
    with pytest.raises(SettingError, match=r"size=\[30000, 30\]: the model's processor takes no such image"):
        count(30000, 30)
    # The processor's own files know nothing of the server's flags.
    limited = configure(path, [*given, "--mm-processor-kwargs", json.dumps({"max_pixels": 224 * 112})])
    fewer = size_counter(limited.model_config)(420, 308)
    assert fewer < image_tokens(path, 420, 308)
    assert fewer <= most_tokens(limited)


class TestNumbering:
    """Positions of Qwen's prompts behind a selection."""

    @staticmethod
    def host(**changes: Any) -> Any:
        from eos_vllm.serving.hosts.mrope import GridHostMixin

        class Stock:
            def get_mrope_input_positions(self, *_: Any) -> str:
                return "stock"

            def embed_input_ids(self, _: Any, multimodal_embeddings: Any, *, is_multimodal: Any) -> Any:
                return multimodal_embeddings

        host = type("Host", (GridHostMixin, Stock), {})
        made = object.__new__(host)
        made.config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    @staticmethod
    def image(offset: int, length: int, rows: int, columns: int) -> Any:
        grid = SimpleNamespace(data=torch.tensor([1, 2 * rows, 2 * columns]))
        place = SimpleNamespace(offset=offset, length=length)
        return SimpleNamespace(mm_position=place, data={"image_grid_thw": grid})

    def test_whole_images_are_left_to_vllm(self) -> None:
        assert self.host().get_mrope_input_positions([0] * 9, [self.image(2, 6, 2, 3)]) == "stock"

    def test_an_image_stands_at_its_first_place_and_text_goes_on_behind_its_grid(self) -> None:
        images = [self.image(2, 4, 3, 5), self.image(8, 6, 2, 3)]  # 4 of 15, and all of 6
        positions, delta = self.host().get_mrope_input_positions([0] * 16, images)
        # text 0 1 | image at 2, five columns wide | text 7 8 | grid of 2 x 3 from 9 | text 12 13
        assert positions[0].tolist() == [0, 1, 2, 2, 2, 2, 7, 8, *[9] * 6, 12, 13]
        assert positions[1].tolist() == [0, 1, 2, 2, 2, 2, 7, 8, 9, 9, 9, 10, 10, 10, 12, 13]
        assert positions[2].tolist() == [0, 1, 2, 2, 2, 2, 7, 8, 9, 10, 11, 9, 10, 11, 12, 13]
        assert 16 + delta == 14  # the first generated token's position

    def test_selected_rows_bring_their_place(self) -> None:
        host = self.host(eos_before=object(), eos_moved=None)
        places = host.eos_places({"image_grid_thw": torch.tensor([[1, 6, 600]])})[0]
        assert places.max() < 256
        kept = [0, 299, 300, 899]
        rows = torch.cat([torch.randn(4, 8), places[kept].float()], dim=1).bfloat16()
        mask = torch.tensor([False, True, True, True, True, False])
        (features,) = host.embed_input_ids(torch.zeros(6), [rows], is_multimodal=mask)
        assert torch.equal(features, rows[:, :8])
        positions = torch.tensor([[4, 5, 5, 5, 5, 305, 0]]).repeat(3, 1)
        moved = host.eos_positions(positions)
        assert moved[0].tolist() == [4, 5, 5, 5, 5, 305, 0]
        assert moved[1].tolist() == [4, 5, 5, 6, 7, 305, 0]
        assert moved[2].tolist() == [4, 5, 304, 5, 304, 305, 0]
        again = positions.clone()
        assert torch.equal(host.eos_positions(again), positions)  # once per step


@pytest.mark.parametrize("family", ["llava-next", "llava-onevision"])
def test_row_ends_in_the_prompt_are_where_the_model_puts_them(family: str, model_of: Any, tmp_path: Path) -> None:
    """The vision model's own rows: those that are its learnt row end, to the last bit."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import ProcessorInputs

    from eos_vllm.models.images import sample_image

    path = model_of(family)
    config = configure(path, flags(tmp_path, profile_of(build.FAMILIES[family].architecture)))
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    theirs = AutoProcessor.from_pretrained(path)
    model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    chat = build.FAMILIES[family].chat
    for size in [(112, 84), (336, 224), (75, 230), (64, 64), (420, 308), (500, 60)]:
        picture = sample_image(0).resize(size)
        items = processor.info.parse_mm_data({"image": picture})
        text = processor.info.get_tokenizer().encode(chat.ask("[I]?"), add_special_tokens=False)
        found = processor.apply(ProcessorInputs(text, items, hf_processor_mm_kwargs={}), timing())
        place = found["mm_placeholders"]["image"][0]
        tokens = np.array(found["prompt_token_ids"][place.offset : place.offset + place.length])
        planner = planner_of(config)
        assert planner is not None
        plan = planner.plan(found["prompt_token_ids"], [ImageSpan(place.offset, place.length)])
        inputs = theirs(text=[chat.ask("[I]?")], images=[picture], return_tensors="pt")
        with torch.no_grad():
            rows = model.get_image_features(
                pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"]
            ).pooler_output[0]
        ends = (rows == model.model.image_newline).all(dim=1).nonzero().flatten().tolist()
        assert len(rows) == place.length
        assert ends == np.flatnonzero(tokens != planner.image_token).tolist() == list(plan.spans[0].text)
        assert len(ends) > 1


def timing() -> Any:
    from vllm.multimodal.processing.context import TimingContext

    return TimingContext(enabled=False)


def test_a_profile_for_images_of_any_size_needs_no_tokens() -> None:
    profile = parse_profile(profile_of("Qwen3VLForConditionalGeneration"))
    assert profile.to_dict()["model"]["visual_tokens"] is None
