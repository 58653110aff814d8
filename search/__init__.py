"""eos-search: the Hugging Face side of eos-vllm: the reference forward pass, the search, and its evaluation."""
