"""The package outside of its checkout: a wheel in a new environment without the packages that only training needs."""

import email
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import REPOSITORY
from packaging.requirements import Requirement

import dclr
from dclr.commands import train

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PYTHONS = [line.split()[-1] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
ONLY_TRAINING = ("deepspeed", "tensorboard")
EXTRAS = ("pyarrow", "onnx", "onnxscript", "onnxruntime", "huggingface_hub", "nbclient", "nbformat", "ipykernel")

MISSING = "training needs the package {}, which is not installed: pip install 'dclr[train]'\n"


def test_links_lead_to_the_folders_at_the_top():
    """One import name, dclr.kernels, works in a checkout, in an editable installation and in a wheel."""
    for name in ("kernels", "ds_configs"):
        assert (REPOSITORY / "dclr" / name).resolve() == REPOSITORY / name


def test_versions_are_the_same_everywhere():
    version = re.escape(dclr.__version__)
    for file, line in (("CITATION.cff", rf"version: {version}$"), ("CHANGELOG.md", rf"## {version}\b")):
        assert re.search(f"^{line}", (REPOSITORY / file).read_text(), re.M), file


@pytest.mark.parametrize("python", PYTHONS)
def test_the_constraints_hold_every_declared_package_within_its_range(python):
    """A package with another newest version on a newer Python has a line for each, with a marker."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = [one for one in pinned if one.marker is None or one.marker.evaluate({"python_version": python})]
    exact = {one.name.lower().replace("_", "-"): str(one.specifier) for one in pinned}
    assert len(exact) == len(pinned)
    extras = [package for packages in PROJECT["optional-dependencies"].values() for package in packages]
    for declared in map(Requirement, [*PROJECT["dependencies"], *extras]):
        version = exact[declared.name.lower().replace("_", "-")]
        assert version.startswith("=="), declared
        assert declared.specifier.contains(version.removeprefix("==")), declared


def test_an_import_imports_only_what_it_needs():
    """`import dclr` imports nothing large, and inference and evaluation import no package of an extra."""
    commands = "dclr.commands.evaluate, dclr.evaluation.retrieval, dclr.evaluation.accuracy, dclr.data.check"
    code = (
        "import sys, dclr; dclr.__version__\n"
        "print(sorted({'torch', 'numpy', 'av', 'matplotlib'} & sys.modules.keys()))\n"
        "dclr.load\n"
        f"print(sorted({ {'matplotlib', *ONLY_TRAINING, *EXTRAS} } & sys.modules.keys()))\n"
        f"import {commands}\n"
        f"print(sorted({ {*ONLY_TRAINING, *EXTRAS} } & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.splitlines() == ["[]"] * 3


@pytest.mark.parametrize("package", ONLY_TRAINING)
def test_training_without_its_packages_says_what_to_install(package, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    assert train.run(["pretrain"]) == 2
    assert capsys.readouterr().err.endswith(
        f"training needs the package {package}, which is not installed: pip install 'dclr[train]'\n"
    )


# ---------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel by way of a source distribution, as it would be published."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(REPOSITORY)]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with the wheel and its dependencies, and without any extra. Return its bin folder.

    The packages of this environment are linked, because installing torch again would take minutes.
    """
    folder = tmp_path_factory.mktemp("light")
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    kept_out = {"dclr", "pip", "setuptools", "__pycache__", *ONLY_TRAINING, *EXTRAS}
    for path in Path(pytest.__file__).parents[1].iterdir():
        name = re.split(r"[-.]", path.name)[0].lower()
        if name not in kept_out and not path.name.startswith("__editable__") and not (site / path.name).exists():
            (site / path.name).symlink_to(path)
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--no-deps", str(wheel)]
    done = run(install, folder)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder outside of the checkout, with no path to the checkout in its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        described = email.message_from_bytes(archive.read(metadata))
    # "kernels" is the name of another package on PyPI, so no such top-level package may be installed.
    assert {name.split("/")[0] for name in names} == {"dclr", f"dclr-{dclr.__version__}.dist-info"}
    sources = {f"dclr/{file.relative_to(REPOSITORY / 'dclr')}" for file in (REPOSITORY / "dclr").rglob("*.py")}
    sources |= {f"dclr/kernels/{file.name}" for file in (REPOSITORY / "kernels").glob("*.py")}
    folders = {"ds_configs": "dclr/ds_configs", "kernels": "dclr/kernels"}
    data = {f"{inside}/{file.name}" for name, inside in folders.items() for file in (REPOSITORY / name).glob("*.json")}
    assert {name for name in names if name.startswith("dclr/")} == sources | data | {"dclr/py.typed"}
    assert described["License-Expression"] == "Apache-2.0"


@pytest.mark.slow
def test_the_wheel_embeds_and_evaluates_without_the_packages_of_training(light, demo_videos, tmp_path):
    none = run([str(light / "python"), "-c", "import kernels"], tmp_path)
    assert "No module named 'kernels'" in none.stderr
    commands = [str(light / "dclr-eval"), "retrieval", "--checkpoint", "random", "--preset", "demo", "--workers", "0"]
    small = ["--data", str(demo_videos), "--width", "4", "--crop-size", "16", "--clip-length", "2"]
    done = run([*commands, *small, "--out", "found"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "chance" in done.stdout
    refused = run([str(light / "dclr-train"), "--epochs", "2"], tmp_path)
    assert (refused.returncode, refused.stderr) == (
        2,
        f"dclr-train: error: {MISSING.format('deepspeed')}",
    )
    usage = run([str(light / "dclr-eval"), "accuracy"], tmp_path)
    assert usage.returncode == 2
    assert usage.stderr.startswith("dclr-eval: error: ")
