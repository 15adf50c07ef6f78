"""The environment and the fixtures of all tests; their helpers are in `support`."""

import fcntl
import gc
import os
import pathlib
import shutil
import signal
import subprocess
import sys

from marjax import numerics

# Children inherit what is ignored here, as in the background of a shell (SIGINT) and under nohup (SIGHUP).
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tracing makes many objects and little garbage: looking for it took a seventh of the time.
gc.set_threshold(200_000, 50, 50)

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Before JAX is imported, and for child processes too. Tests call JAX directly too: under the settings of marjax.
numerics.clean_environment(os.environ)
numerics.PINNED["jax_numpy_rank_promotion"] = "raise"  # as users may have it: marjax broadcasts explicitly
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One thread of XLA's a process: several tests run at once, and their threads would wait for each other's cores.
os.environ.setdefault("NPROC", "1")


def _add_compile_flags():
    """Tests compile for longer than they run: without optimisation, by the emitter that takes half as long, unsplit.

    XLA ends a process whose flags it does not know, so they are tried in one of its own; workers inherit the result.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if "--xla_backend_optimization_level=0" in given:
        return
    for flags in (
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_backend_optimization_level=0",
    ):
        environment = {**os.environ, "XLA_FLAGS": f"{given} {flags}"}
        if not subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True
        ).returncode:
            os.environ["XLA_FLAGS"] = environment["XLA_FLAGS"]
            return


_add_compile_flags()

import numpy as np  # noqa: E402
import pytest  # noqa: E402

pytest.register_assert_rewrite("support")

from support.configs import TINY_AUTOENCODER  # noqa: E402
from support.marks import starts_processes  # noqa: E402


def pytest_xdist_auto_num_workers():
    """One more than cores, since tests wait for processes that they start."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items):
    for item in items:
        if starts_processes(item):
            item.add_marker("processes")


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): a folder that make(folder) has filled, shared by all workers of this run of the tests."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name, make):
        folder, done = root / name, root / f"{name}.done"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def codebook(tmp_path_factory):
    """A file with 16 codes for the digits' patches of 2 x 2: random ones, which all but the pictures is served by."""
    from marjax.images import write_npz
    from marjax.tokenizers.codebook import Codebook, Fit, arrays_of

    path = tmp_path_factory.mktemp("codebook") / "codebook.npz"
    codes = np.random.default_rng(0).uniform(-1, 1, (16, 4)).astype(np.float32)
    write_npz(path, **arrays_of(Codebook(codes, 2, 1), Fit(mse=0.5, psnr=6.0, num_images=1, seed=0, source="random")))
    return path


@pytest.fixture(scope="session")
def autoencoders(tmp_path_factory):
    """A folder with kl.safetensors and vq.safetensors: TINY_AUTOENCODER with seeded weights, and 16 codes."""
    from flax import traverse_util
    from parity.seeded_weights import seeded_array

    from marjax.tokenizers import autoencoder, autoencoder_file
    from marjax.tokenizers.spec import Spec

    folder = tmp_path_factory.mktemp("autoencoders")
    for kind, codes, scale in (("kl", 0, 0.5), ("vq", 16, None)):
        spec = Spec(in_channels=1, embed_dim=4, num_codes=codes, **TINY_AUTOENCODER)
        flat = traverse_util.flatten_dict(autoencoder.abstract_params(spec), sep="/")
        params = {path: seeded_array(path.replace("scale", "weight"), leaf.shape) for path, leaf in flat.items()}
        autoencoder_file.write(
            folder / f"{kind}.safetensors", spec, traverse_util.unflatten_dict(params, sep="/"), scale
        )
    return folder
