"""Where the images of a row are: handles that are cheap to keep and fit to go to worker processes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class FileImages:
    """Image files; ``names`` are their paths in ``folder``."""

    folder: Path
    names: tuple[str, ...]

    def problem(self) -> str | None:
        """Whether a file is missing or no image; only headers are read."""
        for name in self.names:
            try:
                with Image.open(self.folder / name):
                    pass
            except FileNotFoundError:
                return "missing image"
            except (OSError, SyntaxError, ValueError):
                return "unreadable image"
        return None

    def load(self) -> list[Image.Image]:
        """The decoded images."""
        return [Image.open(self.folder / name).convert("RGB") for name in self.names]


@dataclass(frozen=True)
class ColumnImages:
    """``count`` images in a cell of a Hugging Face data set, decoded when they are needed."""

    dataset: Any
    index: int
    column: str
    count: int

    @property
    def names(self) -> tuple[str, ...]:
        """Numbers of row and image."""
        return tuple(f"{self.index}/{i}" for i in range(self.count))

    def problem(self) -> str | None:
        """None: what is wrong with an image shows when it is decoded."""
        return None

    def load(self) -> list[Image.Image]:
        """The decoded images."""
        value = self.dataset[self.index][self.column]
        return [image.convert("RGB") for image in (value if isinstance(value, list) else [value])]


@dataclass(frozen=True)
class DrawnImage:
    """The image of a sample of the embedded benchmark, drawn when it is needed."""

    split: str
    index: int
    version: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The sample's name."""
        name = f"{self.split}-{self.index:06d}"
        return (name if self.version == 1 else f"{name} of version {self.version}",)

    def problem(self) -> str | None:
        """None: it can always be drawn."""
        return None

    def load(self) -> list[Image.Image]:
        """The image."""
        from eos_vllm.cluttervqa import make_sample

        return [make_sample(self.split, self.index, version=self.version).image]
