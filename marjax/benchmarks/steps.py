"""Speed of training and of sampling: useful FLOP/s beside the machine's own matmul rate, in one run."""

import contextlib
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from clu import parameter_overview

from marjax import config as config_lib
from marjax import memory, numerics, progress, sharding
from marjax.assembly import Assembly, assemble
from marjax.errors import UserError
from marjax.generation.plan import generation_plan
from marjax.generation.sampler import Sampler, draw_randomness, sampling_batch
from marjax.models.generator import Classes, PlanStep
from marjax.models.init import init_unboxed
from marjax.perf import flops, peak
from marjax.ranges import check_arguments
from marjax.tokenizers import Tokenizer, TokenShape
from marjax.tokenizers.codebook import Codebook
from marjax.tokenizers.pixels import Pixels
from marjax.training import state as state_lib
from marjax.training.fit import training_batch
from marjax.training.step import make_train_step


@numerics.pinned()
def benchmark(what: str, config: ml_collections.ConfigDict, repeats: int = 3, recompute: int = 0) -> dict[str, Any]:
    """Measures "train" or "sample" steps on random tokens of the config's shape; the tokenizer is left out.

    Args:
      what: "train" times the whole step at `config.train.batch_size`, "sample" one batch of
        `config.sample.batch_size` images.
      config: as a config file returns it, or resolved.
      repeats: timed runs after the first, of which the median counts; 0 only traces and compiles, from shapes alone.
      recompute: of "sample" with a causal backbone: also times so many generation steps, spread over the sequence,
        without the KV cache, each running the whole padded sequence. All steps cost the same, so the median times
        their number is what the batch would take.

    Returns:
      One flat dict: settings, seconds, images/s, compile seconds, peak memory, model FLOP/s, matmul FLOP/s and their
      ratio. The matmul rate is measured before and after, in the same dtype; the better one counts.
    """
    if what not in ("train", "sample"):
        raise UserError(f"benchmark {what!r}: give 'train' or 'sample'")
    check_arguments(repeats=repeats, recompute=recompute)
    config = config_lib.resolve(config)
    assembly = assemble(config)
    assembly = assembly.replace(tokenizer=_stand_in(assembly.tokens))
    mesh, tokens, generator = assembly.mesh, assembly.tokens, assembly.generator
    if recompute and (what != "sample" or not hasattr(generator.backbone, "kv_cache")):
        raise UserError("recompute is for 'sample' with a causal backbone: others have no KV cache")
    result: dict[str, Any] = {
        "what": what,
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "dtype": config.model.dtype,
        "parameters": int(parameter_overview.count_parameters(assembly.params)),
        "batch_size": config.train.batch_size if what == "train" else config.sample.batch_size,
    }
    if what == "sample":
        result |= {key: config.sample[key] for key in ("num_iter", "num_sampling_steps", "cfg")}
    with jax.set_mesh(mesh):
        prepare = _prepare_train if what == "train" else _prepare_sample
        lowered, make_run = prepare(assembly)
        start = time.perf_counter()
        with progress.compiling(f"the {'train step' if what == 'train' else 'sampler'}"):
            compiled = lowered().compile()
        if repeats:
            _refuse(compiled, what, config, mesh)
        result["compile_seconds"] = round(time.perf_counter() - start, 2)
        if not repeats:
            return result
        with progress.activity("measuring matmuls"):
            peaks = [peak.measured_peak(config.model.dtype)]
        with progress.activity("creating the parameters"):
            run = make_run(compiled)
        seconds = []
        with progress.bar("timing", repeats + 1, "runs") as bar:
            for _ in range(repeats + 1):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
                bar.update()
        with progress.activity("timing without the KV cache") if recompute else contextlib.nullcontext():
            steps = _recomputed_steps(config, generator, recompute) if recompute else []
    peaks.append(peak.measured_peak(config.model.dtype))
    if what == "train":
        per_image = flops.train_flops(generator)
    else:
        sample = config.sample
        per_image = flops.sample_flops(
            generator,
            generation_plan(tokens.num_tokens, sample.num_iter),
            sample.num_sampling_steps,
            sample.cfg != 1.0,
            sample.confidence_order,
        )
    # On CPU every device is a share of the same cores; elsewhere each brings its own.
    machine = max(peaks) * (1 if jax.default_backend() == "cpu" else mesh.size)
    median = float(np.median(seconds[1:]))
    images_per_sec = result["batch_size"] / median
    if steps:
        slow = float(np.median(steps)) * tokens.num_tokens
        result |= {
            "recompute_seconds_a_step": round(float(np.median(steps)), 4),
            "recompute_images_per_sec": result["batch_size"] / slow,
            "kv_cache_speedup": slow / median,
        }
    return result | {
        "seconds": round(median, 4),
        "images_per_sec": images_per_sec,
        "peak_memory_gib": round(_peak_memory() / 2**30, 2),
        "model_tflops_per_image": per_image / 1e12,
        "model_gflops_per_sec": images_per_sec * per_image / 1e9,
        "matmul_gflops_per_sec": machine / 1e9,
        "ratio": images_per_sec * per_image / machine,
    }


def _refuse(compiled: Any, what: str, config: ml_collections.ConfigDict, mesh: Any) -> None:
    """Raises UserError: the program does not fit."""
    batch = training_batch(config, mesh) if what == "train" else sampling_batch(config.sample.batch_size, mesh)
    if problem := memory.problem_of(compiled, f"benchmark {what}", batch, memory.available()):
        raise UserError(problem)


Prepared = tuple[Callable[[], Any], Callable[[Any], Callable[[], None]]]


def _stand_in(tokens: TokenShape) -> Tokenizer:
    """Stands for any tokenizer of that shape: what it does is not measured."""
    if not tokens.num_codes:
        return Pixels()
    codes = np.random.default_rng(0).standard_normal((tokens.num_codes, tokens.token_dim), np.float32)
    return Codebook(codes, tokens.patch, tokens.channels)


def _prepare_train(assembly: Assembly) -> Prepared:
    """What lowers the step from shapes alone, and what makes a timed run of the compiled step."""
    config, mesh, tokens, tokenizer = assembly.config, assembly.mesh, assembly.tokens, assembly.tokenizer
    step = make_train_step(assembly)
    rng = np.random.default_rng(0)
    size, side = config.train.batch_size, tokens.height * tokens.patch
    batch = sharding.shard_batch(
        {
            "image": rng.integers(0, 256, (size, side, side, tokens.channels), np.uint8),
            "label": rng.integers(0, config.data.num_classes, size, np.int32),
        },
        mesh,
    )

    def make_run(compiled: Any) -> Callable[[], None]:
        state = [state_lib.create(assembly.generator, assembly.optimizer, assembly.state, config.seed)]

        def run() -> None:
            state[0], metrics = compiled(state[0], batch, tokenizer.params)
            jax.block_until_ready((state[0], metrics))

        return run

    return lambda: step.lower(assembly.state, batch, tokenizer.params), make_run


def _prepare_sample(assembly: Assembly) -> Prepared:
    """The same for one batch of samples."""
    config, abstract = assembly.config, assembly.params
    sampler = Sampler(assembly)
    size = config.sample.batch_size
    inputs = sampler.arguments(abstract, np.arange(size) % config.data.num_classes, config.seed, np.arange(size))

    def make_run(compiled: Any) -> Callable[[], None]:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        init = jax.jit(lambda key: init_unboxed(assembly.generator, key), out_shardings=shardings)
        params = init(numerics.key(config.seed))
        return lambda: compiled(params, *inputs[1:]).block_until_ready()

    return lambda: sampler.program.lower(*inputs), make_run


def _recomputed_steps(config: Any, generator: Any, count: int) -> list[float]:
    """Seconds of `count` generation steps without the cache, after one that compiles and does not count."""
    generator = generator.clone(backbone=generator.backbone.clone(kv_cache=False))
    sample, size = config.sample, config.sample.batch_size
    labels = np.arange(size) % config.data.num_classes
    rand = jax.jit(lambda index: draw_randomness(generator, config.seed, index, sample.num_sampling_steps))(
        np.arange(size)
    )
    params = jax.jit(lambda key: init_unboxed(generator, key))(numerics.key(config.seed))
    if generator.num_codes:
        generator = generator.with_codebook(jnp.zeros((generator.num_codes, generator.token_dim)))

    @jax.jit
    def step(params: Any, state: Any, start: Any, noise: Any) -> Any:
        return generator.apply(
            {"params": params},
            state,
            Classes(labels, labels < 0),
            PlanStep(start, jnp.int32(1), None if sample.cfg == 1.0 else sample.cfg),
            noise,
            known_slots=generator.num_tokens,
            new_slots=1,
            num_sampling_steps=sample.num_sampling_steps,
            temperature=sample.temperature,
            method="generate_step",
        )

    seconds, state = [], generator.init_generation(rand.order, guided=sample.cfg != 1.0)
    for at in np.linspace(0, generator.num_tokens - 1, count + 1).astype(int):
        start = time.perf_counter()
        state = jax.block_until_ready(step(params, state, at, rand.head))
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _peak_memory() -> float:
    """Bytes: of the first device where it reports them, otherwise of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
