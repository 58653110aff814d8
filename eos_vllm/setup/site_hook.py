"""Install the import hook for torch's companion packages into site-packages.

vLLM runs its command line, its engine core and its workers as separate processes, and torchvision may be imported
before any vLLM plugin is loaded, so the hook cannot live in the plugin: Python itself must run it, from a `.pth` file.
The hook is a copy of `torch_companions.py`, so nothing breaks at start-up if eos-vllm is uninstalled later.
"""

import sysconfig
from pathlib import Path

MODULE = "_eos_vllm_torch_companions"
PTH = "eos_vllm_torch_companions.pth"
# A .pth file runs line by line, hence the exec. A hook that is half removed or broken must not disturb any start.
PTH_LINE = f"import sys; exec('try:\\n import {MODULE} as hook; hook.install()\\nexcept Exception:\\n pass')"


def site_packages() -> Path:
    """Return the folder in which this interpreter looks for `.pth` files and pure-Python packages."""
    return Path(sysconfig.get_path("purelib"))


def hook_files(folder: Path | None = None) -> dict[Path, str]:
    """Return the files of the hook in `folder` (this interpreter's site-packages by default), each with its text."""
    folder = folder or site_packages()
    source = Path(__file__).with_name("torch_companions.py").read_text(encoding="utf-8")
    # The module first: at no time may a .pth file name a module that is not there.
    return {folder / f"{MODULE}.py": source, folder / PTH: f"{PTH_LINE}\n"}


def hook_installed(folder: Path | None = None) -> bool:
    """Tell whether `folder` (this interpreter's site-packages by default) holds this version of the hook."""
    return all(path.is_file() and path.read_text(encoding="utf-8") == text for path, text in hook_files(folder).items())


def hook_present(folder: Path | None = None) -> bool:
    """Tell whether `folder` (this interpreter's site-packages by default) holds the hook in this or another version."""
    return any(path.exists() for path in hook_files(folder))


def install_hook(folder: Path | None = None) -> str | None:
    """Write the hook into `folder` (this interpreter's site-packages by default).

    Whether the hook is needed is the caller's question: where the compiled parts load, it changes nothing.

    Returns one line saying what was written, or None if this version of the hook was in place already.
    Raises OSError if the folder cannot be written to.
    """
    if hook_installed(folder):
        return None
    for path, text in hook_files(folder).items():
        path.write_text(text, encoding="utf-8")
    return f"wrote {PTH} and {MODULE}.py, which keep torchvision, torchaudio and torchcodec importable beside CPU torch"
