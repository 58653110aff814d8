"""Small made-up images: coloured shapes on a noisy background, the same for a seed on every machine."""

import base64
import io
import random

from PIL import Image, ImageDraw

from eos_vllm.core.errors import EosError

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 45),
    "purple": (150, 60, 190),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "diamond")


def sample_image(seed: int, size: int = 96) -> Image.Image:
    """Return an RGB image of `size` by `size` pixels with two to five coloured shapes, different for every seed.

    Raises EosError if `size` is below 16.
    """
    if size < 16:
        raise EosError("size", size, "is too small to tell shapes apart", "choose 16 pixels or more")
    numbers = random.Random(seed)
    noise = Image.frombytes("RGB", (size, size), numbers.randbytes(3 * size * size))
    image = noise.point([64 + value // 4 for value in range(256)] * 3)
    draw = ImageDraw.Draw(image)
    cells = numbers.sample([(row, column) for row in range(3) for column in range(3)], numbers.randint(2, 5))
    for row, column in cells:
        extent = numbers.randint(size // 6, size // 4)
        x = column * size // 3 + numbers.randint(0, size // 3 - extent)
        y = row * size // 3 + numbers.randint(0, size // 3 - extent)
        _draw(draw, numbers.choice(SHAPES), (x, y, x + extent, y + extent), numbers.choice(list(COLOURS.values())))
    return image


def _draw(draw: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    middle_x, middle_y = (left + right) // 2, (top + bottom) // 2
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([(middle_x, top), (right, bottom), (left, bottom)], fill=colour)
    else:
        draw.polygon([(middle_x, top), (right, middle_y), (middle_x, bottom), (left, middle_y)], fill=colour)


def to_data_url(image: Image.Image) -> str:
    """Return `image` as a PNG `data:` URL, as chat requests of the OpenAI form take it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
