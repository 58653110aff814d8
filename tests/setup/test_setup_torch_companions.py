"""The import hook, against packages that fail as CUDA wheels of torch's companions do beside CPU torch.

Each test runs an interpreter of its own without the `site` module (-S), so that a hook in the test environment's own
site-packages has no say.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from eos_vllm.setup import torch_companions
from eos_vllm.setup.site_hook import MODULE, PTH, hook_installed, hook_present, install_hook

FILES = {
    "torchvision/__init__.py": "from . import extension\nfrom . import _meta_registrations\n",
    "torchvision/extension.py": "def _has_ops():\n    return False\n",
    "torchvision/_meta_registrations.py": (
        "import torch\n"
        "@torch.library.register_fake('torchvision::nms')\ndef nms(dets, scores, iou_threshold): ...\n"
        "@torch.library.register_fake('torchvision::qnms')\ndef qnms(dets, scores, iou_threshold): ...\n"
    ),
    "torchaudio/__init__.py": "from . import _extension\n",
    "torchaudio/_extension/__init__.py": "from .utils import _load_lib\nAVAILABLE = _load_lib('_torchaudio')\n",
    "torchaudio/_extension/utils.py": "def _load_lib(lib):\n    raise OSError('libc10_cuda.so: no such file')\n",
    "torchcodec/__init__.py": "raise OSError('libc10_cuda.so: no such file')\n",
}
INSTALL = "import eos_vllm.setup.torch_companions as hook; hook.install()"


@pytest.fixture
def packages(tmp_path) -> Path:
    folder = tmp_path / "packages"
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def run_python(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, folders))
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )


def everything(packages: Path) -> list[Path]:
    """The made packages first, then this project, then the real torch."""
    project = Path(torch_companions.__file__).parents[2]
    return [packages, project, Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))]


@pytest.mark.parametrize(
    ("package", "complaint"),
    [("torchvision", "operator torchvision::nms does not exist"), ("torchaudio", "OSError"), ("torchcodec", "OSError")],
)
def test_packages_fail_without_the_hook(packages, package, complaint):
    result = run_python(f"import {package}", *everything(packages))
    assert result.returncode == 1
    assert complaint in result.stderr.splitlines()[-1]


def test_torchvision_is_imported_with_its_operators_declared(packages):
    code = f"{INSTALL}\nimport torchvision, torch\nprint(torch.ops.torchvision.nms.default._schema)"
    result = run_python(code, *everything(packages))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().startswith("torchvision::nms(Tensor dets")
    assert result.stderr == ""


def test_torchvision_whose_extension_loads_is_left_alone(packages):
    (packages / "torchvision/extension.py").write_text("def _has_ops():\n    return True\n")
    (packages / "torchvision/_meta_registrations.py").write_text("")
    code = f"{INSTALL}\nimport torchvision, torch\nprint(hasattr(torch.ops.torchvision, 'nms'))"
    result = run_python(code, *everything(packages))
    assert (result.returncode, result.stdout.strip()) == (0, "False"), result.stderr


def test_torchaudio_is_told_that_it_has_no_extension(packages):
    code = f"{INSTALL}\nimport torchaudio\nprint(torchaudio._extension.AVAILABLE)"
    result = run_python(code, *everything(packages))
    assert (result.returncode, result.stdout.strip()) == (0, "False"), result.stderr


def test_torchaudio_whose_extension_loads_is_left_alone(packages):
    (packages / "torchaudio/_extension/utils.py").write_text("def _load_lib(lib):\n    return lib\n")
    code = f"{INSTALL}\nimport torchaudio\nprint(torchaudio._extension.AVAILABLE)"
    result = run_python(code, *everything(packages))
    assert (result.returncode, result.stdout.strip()) == (0, "_torchaudio"), result.stderr


def test_torchcodec_fails_with_the_error_that_vllm_expects(packages):
    code = f"{INSTALL}\ntry:\n    import torchcodec\nexcept ImportError as error:\n    print(error)"
    result = run_python(code, *everything(packages))
    assert result.returncode == 0, result.stderr
    assert "libc10_cuda.so" in result.stdout


def test_hook_itself_imports_nothing():
    code = (
        "import sys; before = set(sys.modules)\n"
        f"import runpy; exec(compile(open({torch_companions.__file__!r}).read(), 'hook', 'exec'))\n"
        "install(); install(); import json\n"
        "print(sum(finder is CompanionFinder for finder in sys.meta_path), 'torch' in sys.modules)"
    )
    assert run_python(code).stdout.split() == ["1", "False"]


def test_pth_file_installs_the_hook_without_eos_vllm(packages, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    assert not hook_present(site)
    assert install_hook(site) is not None
    assert hook_installed(site)
    code = (
        f"import site, sys; site.addsitedir({str(site)!r})\n"
        "print('torch' in sys.modules, 'eos_vllm' in sys.modules)\n"
        "try:\n    import torchcodec\nexcept ImportError:\n    print('hooked')"
    )
    result = run_python(code, packages)
    assert result.stdout.split() == ["False", "False", "hooked"]
    assert result.stderr == ""


def test_hook_is_renewed_only_when_it_is_another_version(tmp_path):
    install_hook(tmp_path)
    assert install_hook(tmp_path) is None
    (tmp_path / f"{MODULE}.py").write_text("# of an older version\n")
    assert hook_present(tmp_path)
    assert not hook_installed(tmp_path)
    assert install_hook(tmp_path) is not None
    assert hook_installed(tmp_path)


@pytest.mark.parametrize("left", ["nothing", "a module that fails"])
def test_half_removed_hook_disturbs_no_start(tmp_path, left):
    install_hook(tmp_path)
    (tmp_path / f"{MODULE}.py").unlink()
    if left != "nothing":
        (tmp_path / f"{MODULE}.py").write_text("raise RuntimeError\n")
    assert (tmp_path / PTH).exists()
    result = run_python(f"import site; site.addsitedir({str(tmp_path)!r}); print('started')")
    assert (result.stdout.strip(), result.stderr) == ("started", "")
