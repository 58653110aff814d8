"""`eos-vllm shape-model`, `eos-vllm tiny-model`, and the made-up images."""

import argparse
import base64
import io
import subprocess
import sys

import pytest
from PIL import Image

from eos_vllm.cli import shape_model
from eos_vllm.core.errors import EosError
from eos_vllm.models.geometry import geometry
from eos_vllm.models.images import sample_image, to_data_url
from eos_vllm.models.tiny import PRESETS


def run(*arguments):
    parser = argparse.ArgumentParser()
    shape_model.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args([str(argument) for argument in arguments])
    return args.run(args)


def refusal(capsys):
    """Return the one line that a refused command prints on standard error."""
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def test_shape_model_writes_a_directory_to_serve(tmp_path, capsys):
    assert run("shape-model", "--like", "llava-1.5-7b", "--out", tmp_path / "7b") == 0
    assert geometry(tmp_path / "7b") == geometry("llava-1.5-7b")
    assert {path.name for path in (tmp_path / "7b").iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert f"vllm serve {tmp_path / '7b'} --load-format dummy" in capsys.readouterr().out


def test_list_names_every_shape_and_writes_nothing(capsys):
    assert run("shape-model", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llava-1.5-7b: 32 layers, hidden 4096, 32 heads, 576 visual tokens"
    assert lines[1].startswith("llava-1.5-13b: 40 layers")


def test_tiny_model_takes_preset_and_seed(tmp_path, capsys):
    for seed in (0, 7):
        assert run("tiny-model", "--out", tmp_path / str(seed), "--seed", seed) == 0
    assert "1.60 M parameters" in capsys.readouterr().out
    weights = [(tmp_path / seed / "model.safetensors").read_bytes() for seed in ("0", "7")]
    assert weights[0] != weights[1]


def test_the_presets_offered_are_those_there_are():
    assert tuple(PRESETS) == shape_model.PRESET_NAMES


def test_a_full_directory_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for command in (("shape-model", "--like", "llava-1.5-7b"), ("tiny-model",)):
        assert run(*command, "--out", tmp_path) == 2
        line = refusal(capsys)
        assert str(tmp_path) in line
        assert "not empty" in line
        assert "new directory" in line
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_path_below_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("tiny-model", "--out", tmp_path / "file" / "model") == 2
    assert "cannot be created" in refusal(capsys)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("shape-model", "--like", "llava-9", "--out", "x"), ("shape='llava-9'", "llava-1.5-7b")),
        (("shape-model", "--like", "llava-1.5-7b"), ("--out is missing", "--list")),
        (("shape-model", "--out", "x"), ("--like is missing", "--list")),
        (("tiny-model", "--out", "x", "--preset", "huge"), ("preset='huge'", "bench-88m")),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    line = refusal(capsys)
    assert all(part in line for part in parts)
    assert not list(tmp_path.iterdir())


def test_the_commands_are_registered_without_loading_torch():
    # `eos-vllm --help` imports every command.
    code = "import sys, eos_vllm.cli.shape_model; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_images_are_the_same_for_a_seed_and_differ_between_seeds():
    images = [sample_image(seed).tobytes() for seed in range(20)]
    assert images == [sample_image(seed).tobytes() for seed in range(20)]
    assert len(set(images)) == 20


@pytest.mark.parametrize("size", [16, 96, 97, 336])
def test_images_have_the_size_asked_for(size):
    image = sample_image(1, size)
    assert (image.size, image.mode) == ((size, size), "RGB")


def test_images_too_small_for_shapes_are_refused():
    with pytest.raises(EosError, match="size=8"):
        sample_image(0, 8)


def test_a_data_url_holds_the_image():
    image = sample_image(2)
    head, _, data = to_data_url(image).partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == image.tobytes()
