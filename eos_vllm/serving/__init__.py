"""The vLLM plugin. :func:`register` is the ``vllm.general_plugins`` entry point; vLLM calls it in every process."""


def register() -> None:
    """Teaches vLLM's engine arguments ``--eos-profile`` and ``--eos-retain``; without them nothing else changes.

    Only processes that parse engine arguments need it. It is not asked whether this is one: a program may load plugins
    first and make arguments later, and would be served unreduced without a word. All else is carried by the engine's
    configuration (``additional_config["eos"]``), so no process can miss it.
    """
    from eos_vllm.serving.engine_args import install

    install()
