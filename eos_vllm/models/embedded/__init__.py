"""The embedded model: a LLaVA of 1.8 million parameters, trained on ClutterVQA, that comes with the package.

`eos_search.training` makes it (``make embedded-model``); its model card stands beside the weights.
"""

import filecmp
from pathlib import Path

from eos_vllm.cluttervqa import WORDS
from eos_vllm.core.errors import EosError
from eos_vllm.models.model_files import LlavaShape
from eos_vllm.models.tokenizer import FIRST_FREE_ID, word_pieces

SHAPE = LlavaShape(
    num_decoder_layers=8,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    vision_layers=3,
    vision_hidden_size=96,
    vision_attention_heads=3,
    vision_intermediate_size=256,
    image_size=96,
    patch_size=4,
    vision_feature_layer=-1,
    vocab_size=FIRST_FREE_ID + 2 + len(word_pieces(WORDS)),
)
_FILES = Path(__file__).parent / "files"


def is_this(model: str | Path) -> bool:
    """Whether a model directory holds the embedded model's very weights."""
    theirs, ours = Path(model) / "model.safetensors", _FILES / "model.safetensors"
    try:
        return filecmp.cmp(theirs, ours, shallow=False)  # which compares sizes first
    except OSError:
        return False


def path() -> Path:
    """Directory of the model, for ``vllm serve`` and ``AutoModelForImageTextToText.from_pretrained`` alike.

    Raises:
        EosError: the package was built without it.
    """
    if not (_FILES / "model.safetensors").is_file():
        raise EosError("model", "embedded", "is not in this installation", "make it with: make embedded-model")
    return _FILES
