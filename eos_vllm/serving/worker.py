"""What can be asked of a worker by ``collective_rpc``: its counts, its set-up, and whether it is still proved."""

from collections.abc import Sequence
from typing import Any

from eos_vllm.core.plan import Planner
from eos_vllm.serving.model import attention_of
from eos_vllm.serving.options import planner_of
from eos_vllm.serving.watch import what_is_lost


class EosWorkerExtension:
    """Mixed into vLLM's worker class by ``worker_extension_cls``."""

    def eos_report(self) -> dict[str, Any]:
        """Counts since start, the segment of each decoder layer, and all that is lost of its proof, as plain data."""
        worker: Any = self
        runner, model = type(worker.model_runner), worker.model_runner.get_model()
        reduction, before = getattr(model, "eos", None), getattr(model, "eos_before", None)
        report = {
            "engine": worker.vllm_config.parallel_config.data_parallel_index,
            "rank": worker.rank,
            "runner": f"{runner.__module__}.{runner.__name__}",
            "asynchronous": bool(worker.vllm_config.scheduler_config.async_scheduling),
            "rehearsal": "passed: made-up images" if before is not None and before.rehearsed else "not run",
            "lost": parts_missing(planner_of(worker.vllm_config), model),
        }
        if reduction is None:  # all is done before the decoder
            return {**report, **(before.counters.to_dict() if before is not None else {})}
        layers = {i: attention_of(reduction.decoder.layers[i]) for i in reduction.layers}
        return {
            **report,
            **reduction.counters.to_dict(),
            "planned": reduction.planned.to_dict(),
            "segments": [layer.eos_segment for layer in reduction.attention.values()],
            "backends": [layer.attn_backend.__name__ for layer in reduction.attention.values()],
            "rehearsal": reduction.rehearsal,
            "reduction_seconds": reduction.clock.seconds(),
            "lost": [*report["lost"], *what_is_lost(reduction, layers)],
        }

    def eos_trace(self, name: str, keys: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """What was recorded of a request, which is forgotten (:meth:`eos_vllm.serving.trace.Recorder.take`)."""
        worker: Any = self
        model = worker.model_runner.get_model()
        if (recorder := getattr(model, "eos_recorder", None)) is None:
            return []
        before = getattr(model, "eos_before", None)
        records = recorder.take(name, keys, {} if before is None else before.choices)
        return [record.model_dump() for record in records]


def parts_missing(planner: Planner | None, model: Any) -> list[str]:
    """What a profile asks of a worker's model and is not there; a stage without a vision tower selects nothing."""
    if planner is None:
        return ["there is no profile"]
    takes_images = getattr(model, "eos_takes_images", None)
    missing = []
    if planner.profile.inside and getattr(model, "eos", None) is None:
        missing.append("the model reduces nothing within the decoder")
    selects = planner.profile.before is not None and (takes_images is None or takes_images())
    if selects and getattr(model, "eos_before", None) is None:
        missing.append("the model selects nothing before the decoder")
    return missing
