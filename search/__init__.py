"""eos-search: the Hugging Face side of eos-vllm. It holds the reference forward pass, and will hold the search."""
