"""What can be asked of a worker by ``collective_rpc``: its counts and its set-up."""

from typing import Any

from eos_vllm.serving.runner_v1 import reduction_of


class EosWorkerExtension:
    """Mixed into vLLM's worker class by ``worker_extension_cls``."""

    def eos_report(self) -> dict[str, Any]:
        """Counts since start, and the segment of each decoder layer, as plain data."""
        reduction = reduction_of(self.model_runner)  # type: ignore[attr-defined]
        runner = type(self.model_runner)  # type: ignore[attr-defined]
        report = {
            "runner": f"{runner.__module__}.{runner.__name__}",
            "asynchronous": bool(self.vllm_config.scheduler_config.async_scheduling),  # type: ignore[attr-defined]
        }
        if reduction is None:  # all is done before the decoder
            before = self.model_runner.get_model().eos_before  # type: ignore[attr-defined]
            return {**report, **before.counters.to_dict()}
        return {
            **report,
            **reduction.counters.to_dict(),
            "segments": [layer.eos_segment for layer in reduction.attention.values()],
            "backends": [layer.attn_backend.__name__ for layer in reduction.attention.values()],
        }
