"""The doctor's checks that import heavy packages: run as `python -m eos_vllm.setup.probes NAME...`.

Each prints one line as soon as it is done, so that the parent process knows which one crashed this process.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from eos_vllm.setup.checks import FIX, PROBE_MARK, Check, check_version, one_line, supported_range
from eos_vllm.setup.site_hook import hook_installed

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN = "eos"


def torch() -> Check:
    """Import torch and tell which build it is."""
    import torch

    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    return _versioned("torch", torch.__version__, build)


def torchvision() -> Check:
    """Import torchvision, which vLLM's LLaVA needs by way of Pixtral."""
    if importlib.util.find_spec("torchvision") is None:
        return Check("torchvision", False, "not installed", "install the torchvision that belongs to this torch")
    return _companion("torchvision", "torchvision.extension", lambda extension: extension._has_ops())


def torchaudio() -> Check:
    """Import torchaudio, which transformers imports wherever it is installed."""
    if importlib.util.find_spec("torchaudio") is None:
        return Check("torchaudio", True, "not installed, not needed for images")
    return _companion("torchaudio", "torchaudio._extension", lambda extension: extension._IS_TORCHAUDIO_EXT_AVAILABLE)


def torchcodec() -> Check:
    """Import torchcodec, or see that it fails in a way that vLLM is prepared for."""
    if importlib.util.find_spec("torchcodec") is None:
        return Check("torchcodec", True, "not installed, not needed for images")
    version = importlib.metadata.version("torchcodec")
    try:
        importlib.import_module("torchcodec")
    except (ImportError, RuntimeError):
        return Check("torchcodec", True, f"{version}, cannot be loaded, not needed for images")
    except Exception as error:
        return Check("torchcodec", False, _cause(error), _companion_remedy("torchcodec"))
    return Check("torchcodec", True, version)


def transformers() -> Check:
    """Import the part of transformers that all of its models and vLLM rest on."""
    import transformers

    importlib.import_module("transformers.processing_utils")
    return _versioned("transformers", transformers.__version__)


def vllm_imports() -> Check:
    """Import what `vllm serve` and the LLaVA model import."""
    importlib.import_module("vllm.engine.arg_utils")
    importlib.import_module("vllm.model_executor.models.llava")
    return Check("vLLM imports", True, "the engine's arguments and the LLaVA model")


def device() -> Check:
    """Tell which device vLLM will run on."""
    import torch
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return Check("device", True, f"cuda: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if kind == "cpu":
        unused = "; a CUDA GPU is present, but this vLLM is a CPU build" if torch.cuda.is_available() else ""
        return Check("device", True, f"cpu: {torch.backends.cpu.get_cpu_capability()}{unused}")
    if not kind:
        return Check("device", False, "vLLM finds no platform that it can run on", FIX)
    return Check("device", False, kind, "only CUDA and the CPU are supported")


def model_runner() -> Check:
    """Tell which model runner vLLM chooses for a dense model with default settings, and why."""
    from vllm import envs
    from vllm.config import VllmConfig
    from vllm.triton_utils import HAS_TRITON

    forced = envs.VLLM_USE_V2_MODEL_RUNNER
    runner = "V2" if VllmConfig().use_v2_model_runner else "V1"
    if forced and not HAS_TRITON:
        cause = "V2, because VLLM_USE_V2_MODEL_RUNNER is set, but it needs Triton, which is not usable here"
        return Check("model runner", False, cause, "unset VLLM_USE_V2_MODEL_RUNNER")
    if forced is not None:
        why = f"VLLM_USE_V2_MODEL_RUNNER={os.environ.get('VLLM_USE_V2_MODEL_RUNNER')}"
    elif runner == "V2":
        why = "vLLM's default"
    else:
        why = "V2 lacks a feature that is asked for" if HAS_TRITON else "V2 needs Triton, which is not usable here"
    return Check("model runner", True, f"{runner}: {why}")


def eos_plugin() -> Check:
    """Load the plugin as vLLM does in each of its processes, and call it."""
    name = "eos plugin"
    found = list(importlib.metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN))
    if not found:
        return Check(name, False, f"no entry point {PLUGIN} in {PLUGIN_GROUP}", "install eos-vllm: pip install -e .")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return Check(name, False, f"excluded by VLLM_PLUGINS={allowed}", f"add {PLUGIN} to VLLM_PLUGINS, or unset it")
    try:
        found[0].load()()
    except Exception as error:
        return Check(
            name, False, f"{found[0].value}: {_cause(error)}", "mend the cause: until then vLLM leaves the plugin out"
        )
    return Check(name, True, found[0].value)


def flash_attn() -> Check:
    """Tell whether the optional flash-attn package is there; vLLM carries its own copy of the kernels."""
    try:
        return Check("flash-attn", True, f"{importlib.metadata.version('flash-attn')} (optional)")
    except importlib.metadata.PackageNotFoundError:
        return Check("flash-attn", True, "not installed (optional, used on CUDA only)")


PROBE_FUNCTIONS: dict[str, Callable[[], Check]] = {
    "torch": torch,
    "torchvision": torchvision,
    "torchaudio": torchaudio,
    "torchcodec": torchcodec,
    "transformers": transformers,
    "vLLM imports": vllm_imports,
    "device": device,
    "model runner": model_runner,
    "eos plugin": eos_plugin,
    "flash-attn": flash_attn,
}


def main(names: list[str]) -> None:
    """Run the probes `names` and print each result; an exception in one of them is its result."""
    for name in names:
        try:
            result = PROBE_FUNCTIONS[name]()
        except Exception as error:
            result = Check(name, False, _cause(error), "see the cause, and the checks above this one")
        print(f"\n{PROBE_MARK}{json.dumps(asdict(result))}", flush=True)


def _versioned(name: str, version: str, more: str = "") -> Check:
    """Judge the version of a package that has been imported."""
    detail = f"{version}, {more}" if more else version
    if check_version(name, version):
        return Check(name, True, detail)
    return Check(name, False, detail, f"install a supported version, {supported_range(name)}")


def _companion(name: str, extension: str, loaded: Callable[[Any], bool]) -> Check:
    """Import the package `name`; `loaded` tells from its module `extension` whether its compiled part is in use."""
    try:
        version = importlib.import_module(name).__version__
    except Exception as error:
        return Check(name, False, _cause(error), _companion_remedy(name))
    if loaded(sys.modules[extension]):
        return Check(name, True, version)
    return Check(name, True, f"{version}, pure-Python parts only: its compiled part does not fit this torch")


def _companion_remedy(name: str) -> str:
    return f"install the {name} that belongs to this torch" if hook_installed() else FIX


def _cause(error: BaseException) -> str:
    """Name the error on one line, with the first cause behind it."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    text = f"{type(error).__name__}: {error}"
    return one_line(text if first is error else f"{text} ({first})")


if __name__ == "__main__":
    main(sys.argv[1:])
