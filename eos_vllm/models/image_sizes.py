"""How many visual tokens a model makes of an image, asked of the model's own processor."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import SettingError


def parse_image_size(text: str, field: str = "image") -> tuple[int, int]:
    """Width and height of an image, from text such as ``1280x720``.

    Raises:
        SettingError: it is no such text.
    """
    width, by, height = text.lower().partition("x")
    if not (by and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise SettingError(field, text, "this is no size of an image", "give width and height, such as 1280x720")
    return int(width), int(height)


def image_tokens(model: str | Path, width: int, height: int) -> int:
    """Visual tokens that the model in a directory makes of an image of this size.

    Raises:
        SettingError: there is no processor, or it cannot tell.
    """
    try:
        processor = _processor(str(model))
        found = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
    except (OSError, ValueError, AttributeError, KeyError) as error:
        problem = f"its processor cannot tell the tokens of an image ({error})"
        raise SettingError("model", str(model), problem, "give --visual-tokens N") from None
    return int(found["num_image_tokens"][0])


@lru_cache(maxsize=4)
def _processor(model: str) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model)
