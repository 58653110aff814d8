"""What the package needs at run time is declared to setuptools, so that a wheel holds it."""

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import eos_search
import eos_vllm
from eos_vllm.cluttervqa import WORDS
from eos_vllm.models.embedded import SHAPE
from eos_vllm.models.model_files import write_model_files

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {"eos_vllm": Path(eos_vllm.__file__).parent, "eos_search": Path(eos_search.__file__).parent}


def is_declared(name, package):
    """Whether a pattern stands for the file; as in setuptools, a star doesn't reach across folders."""
    parts = name.split("/")
    patterns = [pattern.split("/") for pattern in SETTINGS["package-data"][package]]
    return any(len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern)) for pattern in patterns)


def data_files(package):
    folder = FOLDERS[package]
    return [
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc") and "__pycache__" not in file.parts
    ]


@pytest.mark.parametrize("package", FOLDERS)
def test_every_data_file_is_declared(package):
    data = data_files(package)
    assert data
    assert [name for name in data if not is_declared(name, package)] == []


def test_the_embedded_model_is_among_the_data_but_no_folder_below_it():
    assert "models/embedded/files/model.safetensors" in data_files("eos_vllm")
    assert not is_declared("models/embedded/files/below/model.safetensors", "eos_vllm")


def test_the_embedded_models_files_are_those_that_the_code_writes(tmp_path):
    write_model_files(SHAPE, tmp_path, WORDS)
    committed = {f.name: f.read_bytes() for f in (FOLDERS["eos_vllm"] / "models/embedded/files").iterdir()}
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(committed) == {*written, "README.md", "model.safetensors"}
    assert [name for name in written if written[name] != committed[name]] == []


@pytest.mark.parametrize("package", FOLDERS)
def test_every_package_is_declared(package):
    folder = FOLDERS[package]
    found = {
        ".".join([package, *file.parent.relative_to(folder).parts])
        for file in folder.rglob("*.py")
        if (file.parent / "__init__.py").exists()
    }
    assert found <= set(SETTINGS["packages"])
