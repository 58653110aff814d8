"""Where vLLM compiles, decode steps and text run its compiled forward pass, and answers stay the reference's."""

from pathlib import Path

from eos_search.reference import ReferenceModel
from eos_vllm.serving.stretches import Stretch
from support.engines import answer_all, engine, mixed_asks
from support.profiles import make_profile


def test_compiled_engine_answers_as_the_reference(tiny_model: Path) -> None:
    from vllm.config import CompilationMode

    profile = make_profile(operator_values={"gamma": 0.3, "tau": 0.4, "theta": 0.1, "rho": 0.6, "nu": 0.35})
    asks = mixed_asks(6)
    with engine(tiny_model, profile, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
        reduction = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model.eos
        runs = [part._run for part in reduction.parts if isinstance(part, Stretch)]
        assert len(runs) == 4
        assert all(hasattr(run, "_torchdynamo_orig_callable") for run in runs)  # compiled, between reducers, too
        answers = answer_all(llm, asks)
    reference = ReferenceModel.from_pretrained(str(tiny_model), profile, block=32)
    for ask, answer in zip(asks, answers, strict=True):
        assert answer.token_ids == reference.generate(ask.prompt, ask.images, ask.max_tokens, ask.budget).token_ids
