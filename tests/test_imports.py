"""Everything imports and trains where TensorFlow is not."""

import pkgutil
import subprocess
import sys

import marjax

BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
            raise AssertionError(f"imported {name}")
        if name.split(".")[0] in ("torch", "tensorboard"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Blocker())
"""


def run(code, cwd):
    return subprocess.run([sys.executable, "-c", BLOCKER + code], capture_output=True, text=True, cwd=cwd)


def test_blocker_blocks(tmp_path):
    assert "imported tensorflow" in run("import tensorflow", tmp_path).stderr


def test_no_tensorflow_anywhere(tmp_path):
    modules = [m.name for m in pkgutil.walk_packages(marjax.__path__, "marjax.") if not m.name.endswith("__main__")]
    assert len(modules) > 25
    code = "\n".join(f"import {name}" for name in modules)
    done = run(f"{code}\nimport marjax; marjax.train, marjax.sample", tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_the_package_offers(tmp_path):
    """All is there to be completed, and nothing is imported until it is used."""
    offered = {"train", "sample", "evaluate", "load", "register", "config", "__version__"}
    done = run(
        f"import marjax; assert set(dir(marjax)) >= {offered} and 'jax' not in sys.modules\n"
        "for name in dir(marjax): assert getattr(marjax, name).__doc__, name",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_config_files_do_not_need_jax(tmp_path):
    done = run("import marjax.cli, marjax.config; assert 'orbax' not in sys.modules", tmp_path)
    assert done.returncode == 0, done.stderr
