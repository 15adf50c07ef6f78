"""Files of the current folder are never imported: not by commands, nor by the processes that they start."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.paths import DIGITS, ROOT

DEPENDENCIES = (
    "numpy",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax",
    "grain",
    "tqdm",
    "PIL",
    "absl",
    "etils",
    "marjax",
    "ml_collections",
    "clu",
    "tensorstore",
    "sklearn",
    "gcsfs",
    "fsspec",
    "sitecustomize",
    "usercustomize",
)


@pytest.fixture
def run(tmp_path):
    """Runs a Python program in a folder where every module has a namesake; the names of those that were imported."""
    folder, canary = tmp_path / "current", tmp_path / "canary"
    folder.mkdir()
    for name in (*sys.stdlib_module_names, *DEPENDENCIES):
        (folder / f"{name}.py").write_text(f"open({str(canary)!r}, 'a').write('{name} ')\n")
    # As pip makes it, for any interpreter.
    (tmp_path / "marjax").write_text(
        "import sys\nfrom marjax.__main__ import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
    )

    def run(*arguments, code=0):
        kept = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "PYTHONSAFEPATH")}
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
            env=kept | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout, canary.read_text() if canary.exists() else ""

    return run


def test_the_folder_is_a_trap(run):
    """What `python -m` imports stays Python's business."""
    assert "calendar" in run("-c", "import calendar")[1]


SWEEP = """
import pathlib
CONFIG = "{config}"

def get_sweep():
    yield "point", {{}}

def prepare(root):
    (pathlib.Path(root) / "prepared").touch()
    raise SystemExit(3)  # nothing is trained
"""


def test_a_sweep_and_the_processes_of_its_points(run, tmp_path):
    (tmp_path / "sweep.py").write_text(SWEEP.format(config=f"{DIGITS}:debug"))
    _, imported = run(tmp_path / "marjax", "sweep", tmp_path / "sweep.py", "--root", tmp_path / "root", code=1)
    assert imported == "" and (tmp_path / "root" / "prepared").exists()


SCRIPT = """
import sys
if __name__ == "__main__":
    from marjax import config
    from marjax.data.pipeline import Batches
    from marjax.data.prepare.prepare import prepare
    prepare(sys.argv[1], out=sys.argv[2], workers=2, num_shards=2)
    given = config.resolve(config.load(sys.argv[3]))
    given.data.workers = 1
    with Batches(config.data_config(given), 2, 0) as batches:
        print(next(batches)["image"].shape)
"""


def test_worker_processes_of_a_script(run, tmp_path):
    for index in range(4):
        path = tmp_path / "own" / "class" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(path)
    (tmp_path / "script.py").write_text(SCRIPT)
    printed, imported = run(tmp_path / "script.py", tmp_path / "own", tmp_path / "data", f"{DIGITS}:debug")
    assert imported == "" and "(2, 8, 8, 1)" in printed
    assert (tmp_path / "data" / "own" / "1.0.0" / "dataset_info.json").exists()


def test_interpreter_options_survive_the_restart(run, tmp_path):
    """The process is replaced by one whose malloc asks for huge pages, and by nothing else."""
    (tmp_path / "marjax").write_text(
        "import sys\nfrom marjax import __main__, cli\n"
        "cli.main = lambda: print(sys.flags, sys.argv[1:]) or 0\n"
        "sys.exit(__main__.main())"
    )
    printed, imported = run("-s", "-B", "-X", "utf8", "-W", "error", tmp_path / "marjax", "a  b", "")
    assert imported == "" and "['a  b', '']" in printed
    assert "no_user_site=1" in printed and "utf8_mode=1" in printed and "dont_write_bytecode=1" in printed
