"""The sdist is a checkout without git, the wheel made from it is a whole program."""

import os
import pathlib
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile

import pytest
from support.paths import ROOT

import marjax

pytest.importorskip("setuptools", reason="of the extra test")

FOLDERS = (".ci", ".github", "configs", "docs", "launch", "marjax", "tests")
FILES = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "SECURITY.md",
    "mkdocs.yml",
    "pyproject.toml",
    "ruff.toml",
    "setup.cfg",
    "setup.py",
    ".dockerignore",
    ".gitignore",
    ".pre-commit-config.yaml",
    ".skyignore",
)
LINK = re.compile(r"\]\(([^)#:]+?)(?:#[^)]*)?\)")  # of Markdown, without those that are addresses


def tracked():
    """Every file of the project, relative to its root folder."""
    return {
        *FILES,
        *(
            str(path.relative_to(ROOT))
            for folder in FOLDERS
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ),
    }


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked sdist."""
    tree, made = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("made")
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(made)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    [archive] = made.iterdir()
    with tarfile.open(archive) as packed:
        packed.extractall(made, filter="data")
    return made / f"marjax-{marjax.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
            "--wheel-dir",
            folder,
            sdist,
        ],
        check=True,
    )
    [path] = folder.iterdir()
    return path


def test_the_sdist_has_all_files(sdist):
    found = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert tracked() - found == set()
    assert {name for name in found - tracked() if not name.startswith("marjax.egg-info/")} <= {"PKG-INFO"}
    assert all(os.access(sdist / "launch" / name, os.X_OK) for name in ("quickstart.sh", "test.sh", "local.py"))


def test_relative_links_of_the_docs_lead_to_files_of_the_sdist(sdist):
    pages = [sdist / "README.md", sdist / "CONTRIBUTING.md", *(sdist / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in LINK.findall(page.read_text("utf-8"))]
    assert len(links) > 20
    assert not [(page.name, link) for page, link in links if not (page.parent / link).exists()]


def test_the_wheel_has_the_package_with_its_configs_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {name for name in tracked() if name.startswith("marjax/")}
    assert names == modules | {f"marjax/{name}" for name in tracked() if name.startswith("configs/")}


@pytest.mark.slow
def test_two_commands_to_the_first_picture(wheel, tmp_path):
    """pip install of the wheel, then one command from an empty folder, far from any clone."""
    home, folder = tmp_path / "venv", tmp_path / "empty"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
            wheel,
        ],
        check=True,
    )
    [packages] = home.glob("lib/python*/site-packages")
    (packages / "zz_dependencies.pth").write_text("\n".join(site.getsitepackages()))  # no path of an editable install
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [
            home / "bin" / "marjax",
            "train",
            "--config",
            "digits:debug",
            "--workdir",
            "run",
            "--config.train.steps=2",
            "--config.train.warmup_steps=1",
            "--config.log.samples_every=2",
            "--config.sample.num_iter=1",
        ],
        cwd=folder,
        env=kept,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    assert list((folder / "run" / "samples").glob("*.png")) and os.listdir(folder) == ["run"]
    where = subprocess.run(
        [python, "-P", "-c", "import marjax; print(marjax.__file__)"],
        cwd=folder,
        env=kept,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert pathlib.Path(where).is_relative_to(packages)
