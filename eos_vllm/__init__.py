"""eos-vllm: searched, in-decoder visual token reduction, learnt offline and served by vLLM."""

from importlib.metadata import PackageNotFoundError, version

from eos_vllm.offline import LLM

try:
    __version__ = version("eos-vllm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["LLM", "__version__"]
