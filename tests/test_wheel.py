"""The wheel holds every package, and an installed one works from another folder."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, SPEECH


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
    # From a copy: setuptools leaves build/ beside what it builds, which a later wheel would be filled from.
    copy = folder / "source"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.split("\n"):
        if name.startswith(("higgs_ds/", "ds_configs/")) or name in ("pyproject.toml", "requirements.txt", "README.md"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([*build, str(copy)], capture_output=True, text=True)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("setuptools, which builds the wheel, cannot be had from the package registry")
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_every_module_and_every_deepspeed_file(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "higgs_ds").rglob("*.py")}
    assert len(modules) > 60 and not modules - held
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "higgs_ds").rglob("*.j2")}
    assert templates and not templates - held
    shipped = {path.name for path in (ROOT / "ds_configs").glob("*.json")}
    assert {Path(name).name for name in held if "share/higgs_ds/ds_configs/" in name} == shipped


def test_an_installed_wheel_checks_a_run_from_another_folder(wheel, tiny_dir, codec_dir, tmp_path):
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (site / "training.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and the others, as they are here
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    flags = {"train_manifest": SPEECH, "base_ckpt": tiny_dir, "codec": codec_dir, "output_dir": "out", "dtype": "fp32"}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-m", "higgs_ds", "check", *words, "--num_workers", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok   [rank 0] losses are finite" in done.stdout and "FAIL" not in done.stdout
    assert not (tmp_path / "out/metrics.jsonl").exists() and not (tmp_path / "out/adapter").exists()
