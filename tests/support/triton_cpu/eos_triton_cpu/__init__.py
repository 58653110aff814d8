"""A Triton backend named ``cpu`` that compiles nothing, so that vLLM's V2 model runner starts on a CPU.

vLLM's CPU build has the V2 runner but asks for such a backend; with ``TRITON_INTERPRET=1`` kernels run in Triton's
interpreter and no backend is ever asked to compile. Only processes that put this folder on their path see it.
"""
