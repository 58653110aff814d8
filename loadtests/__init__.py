"""Load tests: what a retain budget buys, stock vLLM with its own defaults against eos-vllm, over HTTP with locust.

Run from the project's root: ``python -m loadtests.sweep`` (then ``report``), ``python -m loadtests.soak``,
``python -m loadtests.guard``, ``python -m loadtests.crosscheck``, or ``locust -f loadtests/locustfile.py``.
"""
