"""Several ranks, drafts, adapters and number formats: the answers of one plain engine, token by token."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eos_vllm.models.images import sample_image
from eos_vllm.models.tiny import write_tiny_model
from support.alone import answers_alone, asks_of, assert_same, assert_same_traces, traces_of
from support.engines import Answer, Ask, answer_all, engine, free_blocks, params_of, prompt_of
from support.profiles import make_profile

PROFILE = make_profile(
    schema="eos-profile/2", operator_values={"gamma": 0.3, "tau": 0.4, "theta": 0.1, "rho": 0.6, "nu": 0.35}
)
_TRANSFER = {"gate": 1.0, "discard": 0.6, "gamma": 0.3, "tau": 0.4, "theta": 0.1, "rho": 0.6, "nu": 0.35}
BEFORE = make_profile(
    schema="eos-profile/2",
    reducers=[
        {"layer": -1, "select": {"rule": "topk"}, **_TRANSFER},
        {"layer": 3, **_TRANSFER},
        {"layer": 5, "withdraw": True},
    ],
)
ASKS = (9, 16)
KEEP_ALL = 576


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that two ranks can share: vLLM splits the vision tower's heads, too."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "even", vision_attention_heads=4)


@pytest.fixture(scope="module")
def alone(model: Path) -> tuple[list[Answer], dict[str, Any], list[dict[str, Any]]]:
    """Answers of one plain engine, what its reducers did, and its traces."""
    with engine(model, PROFILE, page=True) as llm:
        traces = traces_of(llm)
        answers = answer_all(llm, asks_of(*ASKS))
        return answers, llm.collective_rpc("eos_report")[0], traces


def test_tensor_parallel(model: Path, alone: Any, tmp_path: Path) -> None:
    """Both ranks keep the same tokens as one rank does, and say so once."""
    settings: dict[str, Any] = {"tensor_parallel_size": 2, "max_num_batched_tokens": 2048, "page": True}
    run = answers_alone(tmp_path, model, PROFILE, ASKS, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, **settings)
    assert_same(run.answers, alone[0])
    assert_same_traces(run.facts["traces"], alone[2])
    assert len(run.reports) == 2
    for report in run.reports:
        assert report["tokens_kept"] == alone[1]["tokens_kept"]


@pytest.mark.parametrize("partition", ["4,4", "3,5"], ids=["behind-a-reducer", "within-a-segment"])
def test_pipeline_parallel(model: Path, alone: Any, tmp_path: Path, partition: str) -> None:
    variables = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_PP_LAYER_PARTITION": partition}
    settings: dict[str, Any] = {"pipeline_parallel_size": 2, "max_num_batched_tokens": 2048, "page": True}
    run = answers_alone(tmp_path, model, PROFILE, ASKS, variables, **settings)
    assert_same(run.answers, alone[0])
    assert_same_traces(run.facts["traces"], alone[2])
    assert [report["rehearsal"].split(":")[0] for report in run.reports] == ["passed"] * 2
    kept = [sum(counts) for counts in zip(*(report["tokens_kept"] for report in run.reports), strict=True)]
    assert kept == alone[1]["tokens_kept"]


@pytest.mark.parametrize(
    "sizes",
    [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}],
    ids=["tensor", "pipeline"],
)
def test_before_the_decoder_on_two_ranks(model: Path, tmp_path: Path, sizes: dict[str, int]) -> None:
    """Each rank scores with its own heads of the tower, and both choose the same patches."""
    variables = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    settings: dict[str, Any] = {"max_num_batched_tokens": 2048, "page": True}
    run = answers_alone(tmp_path, model, BEFORE, ASKS, variables, **settings, **sizes)
    with engine(model, BEFORE, page=True) as llm:
        assert_same_traces(run.facts["traces"], traces_of(llm))
        assert_same(run.answers, answer_all(llm, asks_of(*ASKS)))


@pytest.mark.parametrize("blocks", [None, 4 * (1376 // 32) + 2], ids=["room", "preemption"])
def test_ngram_drafts(model: Path, alone: Any, tmp_path: Path, blocks: int | None) -> None:
    """In a process of its own: what vLLM loads for drafts keeps it from starting another engine there."""
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    settings: dict[str, Any] = {"speculative_config": speculation, "disable_log_stats": False}
    if blocks is not None:
        settings |= {"max_model_len": 1376, "num_gpu_blocks_override": blocks}
    run = answers_alone(tmp_path, model, PROFILE, ASKS, **settings)
    assert_same(run.answers, alone[0])
    assert run.facts["drafted"] > 0
    assert run.facts["lost_blocks"] == 0
    assert bool(run.facts["preemptions"]) == (blocks is not None)


def test_several_answers_of_one_request(model: Path) -> None:
    """Drawn with a seed: as an engine draws them that keeps all tokens in the reducing pass's stead, and all blocks
    come back."""
    from vllm import SamplingParams

    ask = Ask("USER: <image>\nWhat is it? ASSISTANT:", [sample_image(5)])
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=12, ignore_eos=True)
    with engine(model, PROFILE) as llm:
        free = free_blocks(llm)
        together = llm.generate([prompt_of(ask)], params, use_tqdm=False)[0].outputs
        again = llm.generate([prompt_of(ask)], params, use_tqdm=False)[0].outputs
        assert free_blocks(llm) == free
    assert len({tuple(output.token_ids) for output in together}) == 3
    assert [output.token_ids for output in together] == [output.token_ids for output in again]


def test_structured_output(model: Path) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    asks = [Ask(f"USER: <image>\nWhich colour, {i}? ASSISTANT:", [sample_image(i)]) for i in range(4)]
    choice = SamplingParams(
        temperature=0, max_tokens=8, structured_outputs=StructuredOutputsParams(choice=["red", "blue"])
    )
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    shaped = SamplingParams(temperature=0, max_tokens=24, structured_outputs=StructuredOutputsParams(json=schema))
    with engine(model, PROFILE) as llm:
        outputs = llm.generate([prompt_of(a) for a in asks], [choice, shaped] * 2, use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    assert {texts[0], texts[2]} <= {"red", "blue"}
    assert all(text.lstrip().startswith("{") for text in texts[1::2])


FP8 = pytest.param(
    {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    marks=pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 KV cache needs AVX-512"),
)


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, FP8], ids=["bfloat16", "fp8-kv"])
def test_keeping_all_is_stock_in_the_same_number_format(model: Path, settings: dict[str, Any]) -> None:
    asks = asks_of(*ASKS)
    with engine(model, None, **settings) as llm:
        stock = answer_all(llm, asks)
    for ask in asks:
        ask.budget = KEEP_ALL if ask.images else None
    with engine(model, PROFILE, **settings) as llm:
        assert_same(answer_all(llm, asks), stock, bound=0.0)


def write_adapter(model: Path, folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA adapter of rank 4 over attention and MLP, with random weights; what it adds to the weights, by name."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    generator = torch.Generator().manual_seed(seed)
    adapter, added = {}, {}
    with safe_open(model / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            if "language_model" in name and name.endswith(tuple(f"{n}.weight" for n in names)):
                rows, columns = weights.get_slice(name).get_shape()
                down = 0.2 * torch.randn(4, columns, generator=generator)
                up = 0.2 * torch.randn(rows, 4, generator=generator)
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                adapter[f"{stem}.lora_A.weight"], adapter[f"{stem}.lora_B.weight"] = down, up
                added[name] = up @ down
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": list(names), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return added


def merged(model: Path, folder: Path, added: dict[str, torch.Tensor]) -> Path:
    """The model with an adapter in its weights."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v + added[k] if k in added else v for k, v in weights.items()}, folder / "model.safetensors")
    return folder


def test_adapters(model: Path, tmp_path: Path) -> None:
    """Two adapters in one batch answer as the models that have them in their weights."""
    from vllm.lora.request import LoRARequest

    asks = [ask for ask in asks_of(12, 12) if ask.images]
    want = []
    for seed in (1, 2):
        added = write_adapter(model, tmp_path / f"adapter-{seed}", seed)
        with engine(merged(model, tmp_path / f"merged-{seed}", added), PROFILE) as llm:
            want.append(answer_all(llm, asks))
    assert [a.token_ids for a in want[0]] != [a.token_ids for a in want[1]]
    adapters = [LoRARequest(f"adapter-{seed}", seed, str(tmp_path / f"adapter-{seed}")) for seed in (1, 2)]
    with engine(model, PROFILE, enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
        chosen = [adapters[i % 2] for i in range(len(asks))]
        outputs = llm.generate(
            [prompt_of(a) for a in asks], [params_of(a) for a in asks], use_tqdm=False, lora_request=chosen
        )
    for i, output in enumerate(outputs):
        assert list(output.outputs[0].token_ids) == want[i % 2][i].token_ids, f"request {i}"
