"""Requests to a family: text only, one and two images of many sizes and forms, in all places of a question."""

from PIL import Image

from eos_vllm.models.images import sample_image
from support.engines import Ask
from support.families.build import FAMILIES
from support.families.chats import MARK

# Width and height: small and large, square, wide and tall; OneVision cuts the last but one into more than nine tiles.
SIZES = ((112, 84), (336, 224), (75, 230), (64, 64), (168, 168), (420, 308), (500, 60), (320, 330), (224, 280))
_QUESTIONS = ("What is it?", "Which colour has the larger one, and why?", "?", "Say in a few words where it stands.")
_TEXTS = (
    "[I]{0}",
    "[I][I]Which of the two? {0}",
    "{0} No image here.",
    "First [I]and then [I]{0}",
    "[I]{0}",
    "Look at this, please: [I]{0}",
)


def picture(number: int) -> Image.Image:
    """The ``number``-th image: contents all differ, sizes go round."""
    return sample_image(number).resize(SIZES[number % len(SIZES)])


def family_asks(family: str, count: int = 24, max_tokens: int = 10) -> list[Ask]:
    """As many requests: every sixth has no image, every third two, every fifth is a chat's second turn.

    The last prompt ends in an image.
    """
    chat, asks, next_picture = FAMILIES[family].chat, [], 0
    for i in range(count):
        text = _TEXTS[i % len(_TEXTS)].format(_QUESTIONS[(i + i // 6) % len(_QUESTIONS)])
        prompt = chat.ask(text) + (f" It is red.{chat.ask(_QUESTIONS[i % 4])}" if i % 5 == 4 else "")
        if i == count - 1:
            text, prompt = MARK, chat.begin + "Look: " + chat.image.removesuffix("\n").removesuffix("<|vision_end|>")
        images = [picture(next_picture + n) for n in range(text.count(MARK))]
        next_picture += len(images)
        asks.append(Ask(prompt, images, max_tokens=max_tokens + i % 4))
    return asks
