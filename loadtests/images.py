"""Images as requests carry them, and copies that look the same but are equal to nothing a server has seen."""

import base64
import hashlib
import io
import mimetypes
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from PIL import Image

from eos_vllm.models.images import to_data_url

_BITS = 48


@dataclass(frozen=True)
class Picture:
    """An image file, as it is (``stamp`` empty) or with a stamp in the lowest bits of its first pixels."""

    path: Path
    stamp: str = ""

    @cached_property
    def encoded(self) -> str:
        """``data:`` URL: the file's own bytes, or a PNG of the stamped copy. Kept for as long as the picture is.

        Raises:
            OSError: the file cannot be read, or is no image.
        """
        if self.stamp:
            return to_data_url(stamped(_file(self.path), self.stamp))
        kind = mimetypes.guess_type(self.path.name)[0] or "image/png"
        return f"data:{kind};base64,{base64.b64encode(self.path.read_bytes()).decode('ascii')}"

    @property
    def is_encoded(self) -> bool:
        """Whether the URL has been made."""
        return "encoded" in self.__dict__


@lru_cache(maxsize=256)
def _file(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")


def stamped(image: Image.Image, stamp: str) -> Image.Image:
    """A copy whose first 16 pixels carry 48 bits of the stamp's hash, one in the lowest bit of each channel.

    Servers know images again by their pixels: vLLM skips the vision tower and its preprocessing for one that it has in
    its caches. A stamp makes every showing a new image at a cost of one step of 255 in 48 values.
    """
    bits = int.from_bytes(hashlib.sha256(stamp.encode()).digest()[: _BITS // 8], "big")
    copy = image.copy()
    pixels = copy.load()
    assert pixels is not None
    for i in range(_BITS // 3):
        x, y = i % copy.width, i // copy.width
        value = pixels[x, y]
        pixels[x, y] = tuple((c & ~1) | (bits >> (3 * i + channel) & 1) for channel, c in enumerate(value))  # type: ignore[arg-type]
    return copy
