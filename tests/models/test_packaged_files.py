"""What the package needs at run time is declared to setuptools, so that a wheel holds it."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

import eos_search
import eos_vllm

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {"eos_vllm": Path(eos_vllm.__file__).parent, "eos_search": Path(eos_search.__file__).parent}


@pytest.mark.parametrize("package", FOLDERS)
def test_every_data_file_is_declared(package):
    folder, patterns = FOLDERS[package], SETTINGS["package-data"][package]
    data = [
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc") and "__pycache__" not in file.parts
    ]
    assert data
    assert [name for name in data if not any(fnmatch(name, pattern) for pattern in patterns)] == []


@pytest.mark.parametrize("package", FOLDERS)
def test_every_package_is_declared(package):
    folder = FOLDERS[package]
    found = {
        ".".join([package, *file.parent.relative_to(folder).parts])
        for file in folder.rglob("*.py")
        if (file.parent / "__init__.py").exists()
    }
    assert found <= set(SETTINGS["packages"])
