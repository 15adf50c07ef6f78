"""Speed of evaluation: feature extraction compared with the network alone, and the metrics of given features."""

import time
from typing import Any

import jax
import numpy as np

from marjax import numerics
from marjax.evaluation.metrics.frechet import Moments, frechet_distance
from marjax.evaluation.metrics.inception_score import ScoreSums
from marjax.evaluation.metrics.kernel_distance import kernel_distance
from marjax.evaluation.metrics.precision_recall import precision_recall
from marjax.evaluation.networks.inception import IMAGE_SIZE, NUM_CLASSES, NUM_FEATURES, NUM_SPATIAL, Inception, Network


@numerics.pinned()
def feature_rate(image_size: int, repeats: int = 3, batches: int = 2, batch_size: int = 32) -> dict[str, Any]:
    """Times `Inception.extract` on uint8 images, with host work and resize, and the network alone, alternately.

    The network has random weights; when timed alone, its input is already on the devices.

    Args:
      image_size: height and width of the images.
      repeats: pairs of timings; the median is reported.
      batches: batches per timing.
      batch_size: images per device and batch.

    Returns:
      A dict of settings, "images_per_sec", "network_images_per_sec" and their "ratio" (median of the pairs).
    """
    params = jax.jit(Network().init)(numerics.key(0), np.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32))["params"]
    extractor = Inception(params, "", batch_size=batch_size)
    rows = batch_size * jax.local_device_count()
    images = np.random.default_rng(0).integers(0, 256, (rows * batches, image_size, image_size, 3), np.uint8)
    alone, network_input = extractor.network_alone()
    extractor.extract(images[:rows])
    jax.block_until_ready(alone(network_input))
    seconds: list[tuple[float, float]] = []
    for _ in range(repeats):
        start = time.perf_counter()
        extractor.extract(images)
        middle = time.perf_counter()
        for _ in range(batches):
            found = alone(network_input)
        jax.block_until_ready(found)
        seconds.append((middle - start, time.perf_counter() - middle))
    extraction, network = (len(images) / float(np.median(each)) for each in zip(*seconds, strict=True))
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.local_device_count(),
        "image_size": image_size,
        "images_per_sec": extraction,
        "network_images_per_sec": network,
        "ratio": float(np.median([b / a for a, b in seconds])),
    }


@numerics.pinned()
def metric_seconds(num_images: int = 10_000) -> dict[str, float]:
    """Returns seconds by metric, on random features of Inception's widths for as many real as generated images."""
    rng = np.random.default_rng(0)
    taken: dict[str, float] = {}

    def draw(width: int) -> np.ndarray:
        mix = rng.standard_normal((width, width), np.float32) / np.float32(np.sqrt(width))
        return rng.standard_normal((num_images, width), np.float32) @ mix

    features = draw(NUM_FEATURES)
    for name, width in (("fid", NUM_FEATURES), ("sfid", NUM_SPATIAL)):
        real, made = (features, draw(width)) if width == NUM_FEATURES else (draw(width), draw(width))
        known = Moments(width)
        known.add(real)
        start = time.perf_counter()
        moments = Moments(width)
        moments.add(made)
        frechet_distance(moments.gaussian(), known.gaussian())
        taken[name] = time.perf_counter() - start
    logits = rng.standard_normal((num_images, NUM_CLASSES), np.float32)
    start = time.perf_counter()
    sums = ScoreSums(num_images, NUM_CLASSES)
    sums.add(np.arange(num_images), logits)
    sums.result()
    taken["inception_score"] = time.perf_counter() - start
    other = draw(NUM_FEATURES)
    start = time.perf_counter()
    precision_recall([features], [other])
    taken["precision_recall"] = time.perf_counter() - start
    start = time.perf_counter()
    kernel_distance([other], [features])
    taken["kid"] = time.perf_counter() - start
    return {name: round(value, 2) for name, value in taken.items()} | {
        "seconds": round(sum(taken.values()), 2),
        "num_images": num_images,
    }
