"""``eos_vllm.LLM``: vLLM's offline engine with a profile, which refuses to be one without.

Symptom without it: ``vllm.LLM(additional_config={"eos": ...})`` serves unreduced, and says nothing, where vLLM did not
load the plugin (``VLLM_PLUGINS`` names others, or loading it failed, which vLLM only logs). The plugin cannot notice
that it is missing.
"""

from typing import Any

from eos_vllm.core.errors import SettingError


def LLM(model: str, profile: Any, retain: int | None = None, **settings: Any) -> Any:
    """A ``vllm.LLM`` whose workers have shown that they reduce.

    Args:
        model: as vLLM's.
        profile: as ``--eos-profile``, or its plain data.
        retain: as ``--eos-retain``.
        settings: all else, as vLLM's.

    Raises:
        SettingError: the plugin was not loaded.
        EosError: a profile or setting that cannot be.
    """
    import vllm

    options = {"profile": profile, "retain": retain}
    extra = {**(settings.pop("additional_config", None) or {}), "eos": options}
    llm = vllm.LLM(model, additional_config=extra, **settings)
    config = llm.llm_engine.vllm_config
    if "EosWorkerExtension" not in str(config.parallel_config.worker_extension_cls):
        llm.llm_engine.engine_core.shutdown()
        problem = "vLLM did not load the plugin, and would serve unreduced"
        raise SettingError("VLLM_PLUGINS", "", problem, "unset it or add eos to it, and see eos-vllm doctor")
    llm.collective_rpc("eos_report")
    return llm
