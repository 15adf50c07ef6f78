"""Shared by all tests: the compile cache, and the tiny model whose shapes they agree on."""

import gc
import json
import os
import pathlib
import signal
import subprocess
import sys

from marjax import numerics
from marjax.models.init import init_unboxed

# Children inherit what is ignored here, as in the background of a shell (SIGINT) and under nohup (SIGHUP).
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tracing makes many objects and little garbage: looking for it took a seventh of the time.
gc.set_threshold(200_000, 50, 50)

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Before JAX is imported, and for child processes too. Tests call JAX directly too: under the settings of marjax.
numerics.clean_environment(os.environ)
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

from marjax import config as config_lib  # noqa: E402
from marjax.errors import UserError  # noqa: E402

PARITY = ROOT / "tests" / "parity"
DIGITS = str(ROOT / "configs" / "digits.py")


# Files are handed to the workers whole; the longest go first, so that no worker is left with one at the end.
LONGEST = (
    "test_preemption",
    "test_distributed",
    "test_launch_slurm",
    "test_sharding",
    "test_train",
    "test_quickstart",
    "test_launch_colab",
    "test_train_autoencoder",
    "test_causal",
    "test_sample",
    "test_evaluate",
    "test_samples",
    "test_sweep",
    "test_compile",
    "test_weak_scaling",
    "test_launch_gke",
    "test_storage",
    "test_two_modes",
    "test_latent_cache",
    "test_inception",
    "test_fuzz",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


# Every variant and every head at least once: what all of them must do is tested with these.
MODELS = [
    ("mar", "diffusion"),
    ("ar", "diffusion"),
    ("random_ar", "categorical"),
    ("mar", "categorical"),
    ("ar", "regression"),
]


ADVICE = "make it again"


def failure(call, *args, **kwargs):
    """The one line of the UserError that a reader of foreign files raises, which ends with the advice it was given."""
    with pytest.raises(UserError) as caught:
        call(*args, **{"advice": ADVICE} | kwargs)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(ADVICE) and len(text) < 400
    return text


def own_folder_first():
    """The environment for a script of the tests, which imports what is beside it, whatever the tests' own says."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}


def dotted(fields):
    """{"train__steps": 2} as {"train.steps": 2}, which overrides and overlays are given as."""
    return {key.replace("__", "."): value for key, value in fields.items()}


def flags(fields):
    """The same as arguments of the command line."""
    return [f"--config.{key}={value}" for key, value in dotted(fields).items()]


# Fields of a model that is traced in half the time of a masked one with a denoiser.
QUICK = {"model__variant": "ar", "model__head": "regression", "sample__num_iter": 16}


def make_model(variant, head, codebook, **overrides):
    """`make_digits` with that variant and head; `codebook` is the file of the fixture of that name."""
    from marjax.variants import HEADS, VARIANTS

    given = {"model__variant": variant, "model__head": head, "train__schedule": HEADS[head].schedule}
    if not VARIANTS[variant].many:
        given["sample__num_iter"] = 16
    if HEADS[head].discrete:
        given |= {"tokenizer__name": "codebook", "tokenizer__path": str(codebook), "tokenizer__num_codes": 16}
    return make_digits(**given | overrides)


@pytest.fixture(scope="session")
def codebook(tmp_path_factory):
    """A file with 16 codes for the digits' patches of 2 x 2: random ones, which all but the pictures is served by."""
    from marjax.images import write_npz
    from marjax.tokenizers.codebook import Codebook, Fit, arrays_of

    path = tmp_path_factory.mktemp("codebook") / "codebook.npz"
    codes = np.random.default_rng(0).uniform(-1, 1, (16, 4)).astype(np.float32)
    write_npz(path, **arrays_of(Codebook(codes, 2, 1), Fit(mse=0.5, psnr=6.0, num_images=1, seed=0, source="random")))
    return path


# The smallest autoencoder there is (GroupNorm has 32 groups): 8 x 8 digits become 16 tokens of 4 values.
TINY_AUTOENCODER = dict(width=32, channel_mults=(1, 1), num_res_blocks=1, latent_channels=4)


def make_autoencoder(name, path, **overrides):
    """`make_digits` with the tokenizer `name`, "kl", "vq" or "vq_continuous", of TINY_AUTOENCODER in that file."""
    section = {f"tokenizer__autoencoder__{key}": value for key, value in TINY_AUTOENCODER.items()}
    return make_digits(
        **{
            "tokenizer__name": name,
            "tokenizer__patch_size": 1,
            "tokenizer__num_codes": 16,
            "tokenizer__path": str(path),
            **section,
            **overrides,
        }
    )


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


def make_digits(**overrides):
    """The debug form of the digits config, made smaller still; `train__steps=2` sets train.steps."""
    small = {
        "train.steps": 4,
        "train.warmup_steps": 1,
        "checkpoint.every": 2,
        "log.every": 1,
        "log.samples_every": 0,
        "log.tensorboard": False,
        "log.progress": False,
    }
    return config_lib.apply_overrides(config_lib.load(f"{DIGITS}:debug"), small | dotted(overrides))


def parity(name):
    """The arrays of a parity file and its config."""
    arrays = np.load(PARITY / f"{name}.npz")
    return arrays, json.loads(str(arrays["config"])) if "config" in arrays.files else {}


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def make_generator(num_codes=24, **overrides):
    """A small network on 16 tokens of 4 values with 5 classes; `variant="ar"` sets config.model.variant."""
    from marjax.assembly import model_config
    from marjax.models import generator as generator_lib
    from marjax.variants import HEADS

    config = config_lib.base()
    config.model.update(width=32, encoder_depth=2, decoder_depth=2, num_heads=4, buffer_size=3, dtype="float32")
    config.model.denoiser.update(depth=2, width=32)
    config = config_lib.apply_overrides(config, {f"model.{key}": value for key, value in overrides.items()})
    return generator_lib.build(
        model_config(config.model),
        num_tokens=16,
        token_dim=4,
        num_classes=5,
        num_codes=num_codes if HEADS[config.model.head].discrete else 0,
    )


def perturbed_params(generator, seed=0):
    """Parameters away from their start: layers that begin at zero would hide what depends on what."""
    import jax

    params = jax.jit(lambda key: init_unboxed(generator, key))(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten([x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])
