"""A small convolutional classifier, trained on the real images that samples are measured against.

Metrics of digits or icons need a network that knows them. It is a `FeatureExtractor` like Inception.
Legend: B or N images of H x W pixels (H = W) and C channels, F features, K classes.
"""

import contextlib
import functools
import os
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from marjax import numerics, progress
from marjax.data.config import DataConfig
from marjax.data.pipeline import Batches
from marjax.errors import UserError
from marjax.evaluation.networks.extractor import Extracted, checksum
from marjax.files import make_folder
from marjax.images import write_npz
from marjax.lock import locked_file
from marjax.npz_file import NpzFile
from marjax.paths import takes_paths
from marjax.ranges import check_arguments

NUM_FEATURES = 64
_LARGEST = 1 << 16  # limit of image_size, channels and num_classes in a file
EVAL_BATCH = 256  # batches are padded to this size, so that one program serves any number of images


class _Network(nn.Module):
    """Returns features (B, F), after the ReLU, and logits (B, K) for float32 (B, H, W, C) in [-1, 1]."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        exact = jax.lax.Precision.HIGHEST  # the same features on accelerators as on the CPU
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (3, 3), strides=2, precision=exact)(x))
        features_BxF = nn.relu(nn.Dense(NUM_FEATURES, precision=exact)(x.reshape(len(x), -1)))
        return features_BxF, nn.Dense(self.num_classes, precision=exact)(features_BxF)


class Classifier:
    """A trained network; a `FeatureExtractor`.

    Attributes:
      image_size: H and W of its images.
      channels: C of its images.
      num_classes: K.
      checksum: of its weights.
    """

    name = "classifier"
    num_features = NUM_FEATURES
    num_spatial = 0

    def __init__(self, params: Any, *, image_size: int, channels: int, num_classes: int) -> None:
        self.image_size, self.channels, self.num_classes = image_size, channels, num_classes
        self._params = params
        flat = flax.traverse_util.flatten_dict(params, sep="/")
        self.checksum = checksum({name: np.asarray(value) for name, value in flat.items()})

    @numerics.pinned()
    def extract(self, images: np.ndarray) -> Extracted:
        """See `FeatureExtractor`; takes images of `image_size` and `channels` only."""
        shape = (self.image_size, self.image_size, self.channels)
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            raise ValueError(f"images are {images.dtype} {images.shape}: expected uint8 (N, *{shape})")
        features_NxF = np.empty((len(images), NUM_FEATURES), np.float32)
        logits_NxK = np.empty((len(images), self.num_classes), np.float32)
        for start in range(0, len(images), EVAL_BATCH):
            part = images[start : start + EVAL_BATCH]
            padded = np.pad(part, ((0, EVAL_BATCH - len(part)), (0, 0), (0, 0), (0, 0)))
            rows = slice(start, start + len(part))
            features, logits = _forward(self.num_classes, self._params, padded)
            features_NxF[rows], logits_NxK[rows] = features[: len(part)], logits[: len(part)]
        return Extracted(features_NxF, logits_NxK)

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """The share of images, uint8 (N, H, W, C), classified as their label, int (N,).

        Raises:
          ValueError: no images, or another number of labels.
        """
        labels_N = np.asarray(labels)
        if labels_N.shape != (len(images),) or not len(labels_N):
            raise ValueError(f"labels have shape {labels_N.shape} for {len(images)} images: give one label per image")
        return float(np.mean(self.extract(images).logits.argmax(axis=1) == labels_N))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one npz file; atomic. Raises UserError."""
        names = flax.traverse_util.flatten_dict(self._params, sep="/")
        sizes = {"image_size": self.image_size, "channels": self.channels, "num_classes": self.num_classes}
        write_npz(path, **{name: np.asarray(value) for name, value in (sizes | names).items()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Classifier":
        """Reads a file that `save` wrote. Raises UserError."""
        advice = "give a file of marjax train-classifier"
        with NpzFile(path, advice=advice) as file:
            sizes = {name: int(file.read(name, ("iu", 0))) for name in ("image_size", "channels", "num_classes")}
            wanted = _abstract_params(**sizes) if all(0 < size <= _LARGEST for size in sizes.values()) else {}
            for name, shape in wanted.items():
                if (given := file.header(name, ("f", len(shape))).shape) != shape:
                    raise UserError(f"{file.path}: {name} has the shape {given}, expected {shape}; {advice}")
            if not wanted or set(file.names) != {*sizes, *wanted}:
                raise UserError(f"{file.path} has other arrays or invalid sizes; {advice}")
            arrays = {name: file.read(name, ("f", len(shape))).astype(np.float32) for name, shape in wanted.items()}
        if odd := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
            raise UserError(f"{file.path}: {odd[0]} is not finite; {advice}")
        return cls(flax.traverse_util.unflatten_dict(arrays, sep="/"), **sizes)


@numerics.pinned()
def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    seed: int = 0,
    steps: int = 1000,
    batch_size: int = 128,
    lr: float = 3e-3,
    max_shift: int = 2,
) -> Classifier:
    """Trains with Adam and a cosine decay on randomly shifted images.

    Batches (with replacement) and shifts are drawn from (seed, step): the same arguments give the same network.

    Args:
      images: uint8 (N, S, S, C), in any order.
      labels: int (N,), in [0, num_classes).
      num_classes: K.
      seed: of initialisation, batches and shifts.
      steps: training steps.
      batch_size: images per step.
      lr: the initial learning rate.
      max_shift: in pixels along each axis; the edge is repeated.

    Raises:
      ValueError: images or labels of another type, shape or range.
    """
    labels_N = np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2] or not len(images):
        raise ValueError(f"images are {images.dtype} {images.shape}: expected uint8 (N, S, S, C)")
    if labels_N.shape != (len(images),) or labels_N.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels_N.dtype} {labels_N.shape}: expected integers ({len(images)},)")
    if labels_N.min() < 0 or labels_N.max() >= num_classes:
        raise ValueError(f"labels lie in [{labels_N.min()}, {labels_N.max()}]: expected [0, {num_classes})")
    optimizer = optax.adam(optax.cosine_decay_schedule(lr, steps))
    key = numerics.key(seed)
    params = _Network(num_classes).init(jax.random.fold_in(key, steps), _scaled(images[:1]))["params"]
    opt_state = optimizer.init(params)
    pool = jnp.asarray(images), jnp.asarray(labels_N, jnp.int32)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params: Any, opt_state: Any, images_N: jax.Array, labels_N: jax.Array, step: jax.Array) -> Any:
        pick_key, shift_key = jax.random.split(jax.random.fold_in(key, step))
        rows_B = jax.random.randint(pick_key, (batch_size,), 0, len(images_N))
        batch = _shifted(images_N[rows_B], shift_key, max_shift)

        def loss(params: Any) -> jax.Array:
            _, logits_BxK = _Network(num_classes).apply({"params": params}, _scaled(batch))
            return optax.softmax_cross_entropy_with_integer_labels(logits_BxK, labels_N[rows_B]).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    with progress.bar("train", steps, "steps") as bar:
        for step in range(steps):
            with progress.compiling("the train step") if step == 0 else contextlib.nullcontext():
                params, opt_state = train_step(params, opt_state, *pool, jnp.int32(step))
            bar.update()
        jax.block_until_ready(params)
    return Classifier(
        jax.device_get(params), image_size=images.shape[1], channels=images.shape[3], num_classes=num_classes
    )


@numerics.pinned()
@takes_paths("out")
def classifier_of(
    data: DataConfig,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    steps: int = 1000,
    held_out: float = 0.2,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Trains a classifier on a data set and writes it: `marjax train-classifier`.

    Args:
      data: a resolved `config.data`; all images are read into memory, without flips.
      out: the npz file.
      seed: of the training and of the choice of held-out images.
      steps: training steps.
      held_out: the share of images for testing.
      overwrite: replace an existing file.

    Returns:
      `accuracy` on the held-out images, `num_trained`, `num_tested`.

    Raises:
      UserError: invalid input.
    """
    check_arguments(seed=seed, steps=steps, held_out=held_out)
    if epath.Path(out).exists() and not overwrite:
        raise UserError(f"{out} exists; give another --out or --overwrite it")
    make_folder(os.path.dirname(os.fspath(out)) or ".")
    with locked_file(out, "marjax train-classifier"):
        with progress.activity("reading the images"), Batches(data, EVAL_BATCH, 0, train=False) as batches:
            count, parts = batches.num_examples, list(batches)
        assert data.num_classes is not None  # the config is resolved
        images, labels = (np.concatenate([part[name] for part in parts])[:count] for name in ("image", "label"))
        order = np.random.RandomState(seed).permutation(count)
        tested = round(count * held_out)
        if not 0 < tested < count:
            raise UserError(
                f"held_out={held_out} leaves no image to train or to test on, of {count}; use another share"
            )
        train, test = order[tested:], order[:tested]
        made = train_classifier(
            images[train],
            labels[train],
            data.num_classes,
            seed=seed,
            steps=steps,
            max_shift=min(2, data.image_size // 8),  # 2 pixels lose too much of 8
        )
        made.save(out)
        return {"accuracy": made.accuracy(images[test], labels[test]), "num_trained": len(train), "num_tested": tested}


@functools.lru_cache(maxsize=8)
def _abstract_params(image_size: int, channels: int, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Parameter shapes by name."""
    image = jax.ShapeDtypeStruct((1, image_size, image_size, channels), jnp.float32)
    params = jax.eval_shape(_Network(num_classes).init, numerics.key(0), image)["params"]
    return {name: leaf.shape for name, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()}


@functools.partial(jax.jit, static_argnums=0)
def _forward(num_classes: int, params: Any, images: jax.Array) -> Any:
    return _Network(num_classes).apply({"params": params}, _scaled(images))


def _scaled(images: Any) -> jax.Array:
    """Converts uint8 to float32 in [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def _shifted(images: jax.Array, key: jax.Array, limit: int) -> jax.Array:
    """Shifts each image of (B, H, W, C) by a random integer in [-limit, limit] along each axis."""
    padded = jnp.pad(images, ((0, 0), (limit, limit), (limit, limit), (0, 0)), mode="edge")
    corners_Bx2 = jax.random.randint(key, (len(images), 2), 0, 2 * limit + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], jnp.int32(0)), images.shape[1:])

    return jax.vmap(crop)(padded, corners_Bx2)
