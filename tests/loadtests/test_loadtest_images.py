"""Images that look the same and are equal to nothing that a server knows."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eos_vllm.models.images import sample_image
from loadtests.images import Picture, stamped


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    sample_image(3, 48).save(path)
    return path


def pixels_of(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))).convert("RGB")).astype(int)


def test_without_a_stamp_the_image_is_as_it_is(file: Path) -> None:
    assert (pixels_of(Picture(file).encoded) == np.asarray(Image.open(file))).all()


def test_a_stamp_changes_lowest_bits_of_16_pixels_at_most(file: Path) -> None:
    change = pixels_of(Picture(file, "a/1").encoded) - np.asarray(Image.open(file)).astype(int)
    assert 0 < np.abs(change).sum() <= 48
    assert np.abs(change).max() == 1
    assert not change[1:].any()


def test_stamps_tell_images_apart_and_say_the_same_twice(file: Path) -> None:
    urls = {Picture(file, f"run/{i}").encoded for i in range(200)}
    assert len(urls) == 200
    assert len({pixels_of(url).tobytes() for url in urls}) == 200
    assert Picture(file, "run/7").encoded in urls


def test_images_narrower_than_a_stamp() -> None:
    image = Image.new("RGB", (5, 5))
    assert stamped(image, "x").tobytes() != stamped(image, "y").tobytes()
    assert image.tobytes() == bytes(75)


def test_files_without_a_stamp_are_sent_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    sample_image(3, 48).save(path)
    url = Picture(path).encoded
    assert url.startswith("data:image/jpeg;base64,")
    assert base64.b64decode(url.split(",", 1)[1]) == path.read_bytes()


def test_encoded_bodies_are_kept_however_many_there_are(file: Path) -> None:
    pictures = [Picture(file, f"run/{i}") for i in range(600)]
    first = [picture.encoded for picture in pictures]
    assert all(picture.is_encoded for picture in pictures)
    assert all(picture.encoded is body for picture, body in zip(pictures, first, strict=True))
    assert not Picture(file, "run/0").is_encoded
