"""Speed of training and sampling: model FLOP/s beside the machine's own matmul rate, measured in one run."""

import contextlib
import resource
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview

from marjax import config as config_lib
from marjax import memory, numerics, progress
from marjax.assembly import assemble
from marjax.benchmarks.sampling import prepare_sample, recomputed_steps
from marjax.benchmarks.train_step import prepare_train
from marjax.errors import UserError
from marjax.perf import peak
from marjax.ranges import check_arguments
from marjax.tokenizers import Tokenizer, TokenShape
from marjax.tokenizers.codebook import Codebook
from marjax.tokenizers.pixels import Pixels


@numerics.pinned()
def benchmark(what: str, config: ml_collections.ConfigDict, repeats: int = 3, recompute: int = 0) -> dict[str, Any]:
    """Measures the train step or the sampler on random tokens of the config's shape, without the tokenizer.

    Args:
      what: "train" for one step with `config.train.batch_size` images, "sample" for one batch of
        `config.sample.batch_size` images.
      config: as a config file returns it, or resolved.
      repeats: timed runs after a first untimed one; the median is reported. 0 only compiles, without parameters.
      recompute: number of generation steps to time without the KV cache, spread over the sequence; only for "sample"
        with a causal backbone. Every such step runs the entire padded sequence, so that all cost the same, and their
        median times their number is the time of the batch.

    Returns:
      A flat dict of settings, seconds, images/s, compile seconds, peak memory, model FLOP/s, matmul FLOP/s and their
      ratio. The matmul rate is measured before and after in the same dtype; the better one counts.

    Raises:
      UserError: an invalid argument or config, or a program that does not fit into memory.
    """
    if what not in ("train", "sample"):
        raise UserError(f"benchmark {what!r} is unknown; use 'train' or 'sample'")
    check_arguments(repeats=repeats, recompute=recompute)
    config = config_lib.resolve(config)
    assembly = assemble(config)
    assembly = assembly.replace(tokenizer=_stand_in(assembly.tokens))
    mesh = assembly.mesh
    if recompute and (what != "sample" or not hasattr(assembly.generator.backbone, "kv_cache")):
        raise UserError("recompute is for 'sample' with a causal backbone; others have no KV cache")
    with jax.set_mesh(mesh):
        prepared = prepare_train(assembly) if what == "train" else prepare_sample(assembly)
        size = prepared.batch.size
        result: dict[str, Any] = {
            "what": what,
            "device": jax.devices()[0].device_kind,
            "devices": mesh.size,
            "dtype": config.model.dtype,
            "parameters": int(parameter_overview.count_parameters(assembly.params)),
            "batch_size": size,
            **prepared.settings,
        }
        start = time.perf_counter()
        with progress.compiling(f"the {prepared.name}"):
            compiled = prepared.lower().compile()
        result["compile_seconds"] = round(time.perf_counter() - start, 2)
        if not repeats:
            return result
        if problem := memory.problem_of(compiled, f"benchmark {what}", prepared.batch, memory.available()):
            raise UserError(problem)
        with progress.activity("measuring matmuls"):
            peaks = [peak.measured_peak(config.model.dtype)]
        with progress.activity("creating the parameters"):
            run = prepared.make_run(compiled)
        seconds = []
        with progress.bar("timing", repeats + 1, "runs") as bar:
            for _ in range(repeats + 1):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
                bar.update()
        with progress.activity("timing without the KV cache") if recompute else contextlib.nullcontext():
            steps = recomputed_steps(assembly, recompute) if recompute else []
    peaks.append(peak.measured_peak(config.model.dtype))
    # On CPU all devices share the same cores; elsewhere each has its own.
    machine = max(peaks) * (1 if jax.default_backend() == "cpu" else mesh.size)
    median = float(np.median(seconds[1:]))
    if steps:
        slow = float(np.median(steps)) * assembly.tokens.num_tokens
        result |= {
            "recompute_seconds_a_step": round(float(np.median(steps)), 4),
            "recompute_images_per_sec": size / slow,
            "kv_cache_speedup": slow / median,
        }
    per_image, images_per_sec = prepared.flops_per_image, size / median
    return result | {
        "seconds": round(median, 4),
        "images_per_sec": images_per_sec,
        "peak_memory_gib": round(_peak_memory() / 2**30, 2),
        "model_tflops_per_image": per_image / 1e12,
        "model_gflops_per_sec": images_per_sec * per_image / 1e9,
        "matmul_gflops_per_sec": machine / 1e9,
        "ratio": images_per_sec * per_image / machine,
    }


def _stand_in(tokens: TokenShape) -> Tokenizer:
    """A cheap tokenizer of the same token shape; the tokenizer is not measured."""
    if not tokens.num_codes:
        return Pixels()
    codes = np.random.default_rng(0).standard_normal((tokens.num_codes, tokens.token_dim), np.float32)
    return Codebook(codes, tokens.patch, tokens.channels)


def _peak_memory() -> float:
    """Peak bytes in use on the first device if it reports them, otherwise of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
