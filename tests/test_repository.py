"""What the repository's own files promise: CI, citation, versions, and paths named in the docs."""

import configparser
import re

import pytest
from support.paths import ROOT

import marjax

yaml = pytest.importorskip("yaml", reason="of the extra test")
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def test_the_workflow_calls_ci_on_every_supported_python():
    [job] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert {"run": ".ci/run"} in job["steps"]
    classifiers = SETUP["metadata"]["classifiers"].splitlines()
    assert job["strategy"]["matrix"]["python"] == [line[-4:] for line in classifiers if "3." in line]
    for form in ("bug", "feature"):
        assert yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())["body"]


def test_the_citation_has_its_required_keys():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert {"type", "title", "authors"} <= citation["preferred-citation"].keys()
    assert citation["version"] == marjax.__version__


def test_pre_commit_has_the_versions_of_setup_cfg():
    [hooks] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"ruff=={hooks['rev'].removeprefix('v')}" in SETUP["options.extras_require"]["test"].splitlines()


def test_paths_named_in_the_docs_exist():
    missing = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        named = re.findall(r"(?<![\w./~-])(?:marjax|tests|docs|configs|launch)/[\w./]*\w\.\w+", page.read_text("utf-8"))
        missing += [(page.name, path) for path in named if not (ROOT / path).exists()]
    assert missing == [("sweeps.md", "configs/my_sweep.py")] * len(missing)  # the reader's own file


def test_contributing_names_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = [path for path in (ROOT / "marjax").iterdir() if re.fullmatch(r"[a-z]\w*(\.py)?", path.name)]
    assert not [name for path in rooms if (name := f"`{path.name}{'/' * path.is_dir()}`") not in text]
