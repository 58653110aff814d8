"""What a fresh environment needs before vLLM's CPU build runs in it, and the checks that tell whether it has it.

Nothing here imports vLLM, and only `probes` imports torch, so that `eos-vllm doctor` works where they don't.
"""
