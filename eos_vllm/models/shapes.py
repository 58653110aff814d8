"""Published LLaVA models by their sizes, so that they can be planned for and served with dummy weights.

Throughput doesn't depend on the values of the weights: a directory written here, served with `--load-format dummy`,
measures what the published model does on the same machine. Its answers are without meaning, and its tokenizer gives
one token for each byte of a prompt, so prompts are best measured in tokens.
"""

from dataclasses import replace
from pathlib import Path

from eos_vllm.core.errors import EosError
from eos_vllm.models.model_files import LlavaShape, prepare_directory, write_model_files

# Vicuna's 32,000 tokens, the image and padding tokens, and unused ids that round the vocabulary up to 64.
LLAVA_1_5_7B = LlavaShape(
    num_decoder_layers=32,
    hidden_size=4096,
    intermediate_size=11008,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    vision_layers=24,
    vision_hidden_size=1024,
    vision_attention_heads=16,
    vision_intermediate_size=4096,
    image_size=336,
    patch_size=14,
    vision_feature_layer=-2,
    vocab_size=32064,
    image_token_id=32000,
    max_position_embeddings=4096,
    dtype="float16",
)
SHAPES = {
    "llava-1.5-7b": LLAVA_1_5_7B,
    "llava-1.5-13b": replace(
        LLAVA_1_5_7B,
        num_decoder_layers=40,
        hidden_size=5120,
        intermediate_size=13824,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
}


def find_shape(name: str) -> LlavaShape:
    """Return the shape called `name`, such as "llava-1.5-7b".

    Raises EosError, which lists the names, if there is none.
    """
    if name not in SHAPES:
        raise EosError("shape", name, "is unknown", f"choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def write_shape_model(name: str, directory: str | Path) -> Path:
    """Write everything but the weights of the model called `name` to `directory` and return it.

    Raises EosError for an unknown name or a directory that holds anything (nothing is written then), OSError if
    writing fails.
    """
    shape = find_shape(name)
    return write_model_files(shape, prepare_directory(directory))
