"""Images as requests carry them, and copies that look the same but are equal to nothing a server has seen."""

import hashlib
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from eos_vllm.models.images import to_data_url

_BITS = 48


@dataclass(frozen=True)
class Picture:
    """An image file, as it is (``stamp`` empty) or with a stamp in the lowest bits of its first pixels."""

    path: Path
    stamp: str = ""

    def data_url(self) -> str:
        """PNG ``data:`` URL."""
        return _data_url(self.path, self.stamp)


@lru_cache(maxsize=256)
def _file(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")


@lru_cache(maxsize=256)
def _data_url(path: Path, stamp: str) -> str:
    return to_data_url(stamped(_file(path), stamp) if stamp else _file(path))


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
