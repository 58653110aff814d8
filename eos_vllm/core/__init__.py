"""Operator, importance, profile, plan and the reduction step: pure functions that know no engine.

The search, the Hugging Face reference and the vLLM plugin all call these; nothing here imports vLLM or transformers.
"""
