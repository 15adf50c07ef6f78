"""Speed of training and of sampling: useful FLOP/s beside the machine's own matmul rate, in one run."""

import resource
import time
from typing import Any

import jax
import ml_collections
import numpy as np

from marjax import config as config_lib
from marjax import flops, peak, sharding
from marjax.errors import UserError
from marjax.generation.sampler import Sampler, Settings
from marjax.models import generator as generator_lib
from marjax.tokenizers import TokenShape, token_shape
from marjax.tokenizers.pixels import Pixels
from marjax.training import state as state_lib
from marjax.training.optimizer import make_optimizer
from marjax.training.step import make_train_step


def benchmark(what: str, config: ml_collections.ConfigDict, repeats: int = 3) -> dict[str, Any]:
    """Measures "train" or "sample" steps on random tokens of the config's shape; the tokenizer is left out.

    Args:
      what: "train" times the whole step at `config.train.batch_size`, "sample" one batch of
        `config.sample.batch_size` images.
      config: as a config file returns it, or resolved.
      repeats: timed runs after the first, of which the median counts.

    Returns:
      One flat dict: settings, seconds, images/s, compile seconds, peak memory, model FLOP/s, matmul FLOP/s and their
      ratio. The matmul rate is measured before and after, in the same dtype; the better one counts.
    """
    if what not in ("train", "sample"):
        raise UserError(f"benchmark {what!r}: give 'train' or 'sample'")
    config = config_lib.resolve(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    tokens = token_shape(config.tokenizer.name, image_size=config.data.image_size, channels=config.data.channels,
                         patch_size=config.tokenizer.patch_size)
    generator = generator_lib.build(config.model, num_tokens=tokens.num_tokens, token_dim=tokens.token_dim,
                                    num_classes=config.data.num_classes)
    peaks = [peak.measured_peak(config.model.dtype)]
    with jax.set_mesh(mesh):
        measure = _train if what == "train" else _sample
        batch, per_image, compile_seconds, seconds, memory = measure(config, mesh, tokens, generator, repeats)
    peaks.append(peak.measured_peak(config.model.dtype))
    # On CPU every device is a share of the same cores; elsewhere each brings its own.
    machine = max(peaks) * (1 if jax.default_backend() == "cpu" else mesh.size)
    median = float(np.median(seconds))
    rate = batch * per_image / median
    result = {
        "what": what, "device": jax.devices()[0].device_kind, "devices": mesh.size, "dtype": config.model.dtype,
        "batch_size": batch, "seconds": round(median, 4), "images_per_sec": batch / median,
        "compile_seconds": round(compile_seconds, 2), "peak_memory_gib": round(memory / 2**30, 2),
        "model_tflops_per_image": per_image / 1e12, "model_gflops_per_sec": rate / 1e9,
        "matmul_gflops_per_sec": machine / 1e9, "ratio": rate / machine,
    }
    if what == "sample":
        result |= {key: config.sample[key] for key in ("num_iter", "num_sampling_steps", "cfg")}
    return result


def _train(config: Any, mesh: Any, tokens: TokenShape, generator: Any, repeats: int) -> tuple[Any, ...]:
    optimizer = make_optimizer(config.train)
    abstract = state_lib.abstract_state(generator, optimizer, mesh)
    step = make_train_step(config, generator, Pixels(), tokens, optimizer, abstract, mesh)
    rng = np.random.default_rng(0)
    size = config.train.batch_size
    side = tokens.height * tokens.patch
    batch = sharding.put_batch({
        "image": rng.integers(0, 256, (size, side, side, tokens.channels), np.uint8),
        "label": rng.integers(0, config.data.num_classes, size, np.int32)}, mesh)
    state = state_lib.create(generator, optimizer, abstract, config.seed)
    start = time.perf_counter()
    compiled = step.lower(state, batch, {}).compile()
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, batch, {})
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    per_image = flops.train_flops(config.model, tokens.num_tokens, tokens.token_dim)
    return size, per_image, compile_seconds, seconds[1:], _peak_memory()


def _sample(config: Any, mesh: Any, tokens: TokenShape, generator: Any, repeats: int) -> tuple[Any, ...]:
    abstract = state_lib.abstract_params(generator, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    init = jax.jit(lambda key: state_lib.init_unboxed(generator, key), out_shardings=shardings)
    sampler = Sampler(generator, Pixels(), tokens, Settings.of(config, tokens), mesh)
    size = config.sample.batch_size
    arguments = sampler.arguments(init(jax.random.key(config.seed)), np.arange(size) % config.data.num_classes,
                                  config.seed, np.arange(size))
    start = time.perf_counter()
    compiled = sampler.program.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        compiled(*arguments).block_until_ready()
        seconds.append(time.perf_counter() - start)
    per_image = flops.sample_flops(config.model, config.sample, tokens.num_tokens, tokens.token_dim)
    return size, per_image, compile_seconds, seconds[1:], _peak_memory()


def _peak_memory() -> float:
    """Bytes: of the first device where it reports them, otherwise of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
