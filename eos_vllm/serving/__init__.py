"""The vLLM plugin. :func:`register` is the ``vllm.general_plugins`` entry point; vLLM calls it in every process."""

import sys


def register() -> None:
    """Teaches vLLM's engine arguments ``--eos-profile`` and ``--eos-retain``; without them nothing else changes.

    Only processes that parse engine arguments need it; they have imported the module before they load plugins. All
    else is carried by the engine's configuration (``additional_config["eos"]``), so no process can miss it.
    """
    if "vllm.engine.arg_utils" in sys.modules:
        from eos_vllm.serving.engine_args import install

        install()
