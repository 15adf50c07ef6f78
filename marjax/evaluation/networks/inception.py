"""FID's InceptionV3: the TensorFlow graph of 2015-12-05, as shipped by torch-fidelity and pytorch-fid.

It differs from the published network: 1008 classes, 3 x 3 average pooling that excludes padding, max instead of average
pooling in the last block, and TF1's bilinear resize, which aligns pixel corners. FIDs of two programs are comparable
only if all of this is equal, and float32 too, so there is no bfloat16 option.
Legend: B or N images of H x W pixels and C channels.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from marjax import memory, numerics
from marjax.evaluation.networks.extractor import Extracted

IMAGE_SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7  # the first of 192, as in the ADM evaluator's sFID
NUM_SPATIAL = 17 * 17 * SPATIAL_CHANNELS

_EXACT = jax.lax.Precision.HIGHEST  # no bfloat16 or TF32 on accelerators


def _conv(
    x: jax.Array,
    name: str,
    features: int,
    kernel: int | tuple[int, int] = 1,
    strides: int = 1,
    padding: str | None = None,
) -> jax.Array:
    """A convolution with folded BatchNorm, and ReLU; by default padded if the stride is 1."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = padding or ("SAME" if strides == 1 else "VALID")
    return nn.relu(nn.Conv(features, kernel, strides, padding, precision=_EXACT, name=name)(x))


def _shrink(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2))


def _average(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


class _BlockA(nn.Module):
    """35 x 35."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _conv(x, "branch1x1", 64)
        five = _conv(_conv(x, "branch5x5_1", 48), "branch5x5_2", 64, 5)
        three = _conv(_conv(x, "branch3x3dbl_1", 64), "branch3x3dbl_2", 96, 3)
        three = _conv(three, "branch3x3dbl_3", 96, 3)
        return jnp.concatenate([one, five, three, _conv(_average(x), "branch_pool", self.pool_features)], -1)


class _BlockB(nn.Module):
    """From 35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _conv(_conv(x, "branch3x3dbl_1", 64), "branch3x3dbl_2", 96, 3)
        three = _conv(three, "branch3x3dbl_3", 96, 3, strides=2)
        return jnp.concatenate([_conv(x, "branch3x3", 384, 3, strides=2), three, _shrink(x)], -1)


class _BlockC(nn.Module):
    """17 x 17; also returns the 1 x 1 branch."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        one = _conv(x, "branch1x1", 192)
        seven = _conv(_conv(x, "branch7x7_1", self.width), "branch7x7_2", self.width, (1, 7))
        seven = _conv(seven, "branch7x7_3", 192, (7, 1))
        twice = _conv(_conv(x, "branch7x7dbl_1", self.width), "branch7x7dbl_2", self.width, (7, 1))
        twice = _conv(_conv(twice, "branch7x7dbl_3", self.width, (1, 7)), "branch7x7dbl_4", self.width, (7, 1))
        twice = _conv(twice, "branch7x7dbl_5", 192, (1, 7))
        return jnp.concatenate([one, seven, twice, _conv(_average(x), "branch_pool", 192)], -1), one


class _BlockD(nn.Module):
    """From 17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _conv(_conv(x, "branch3x3_1", 192), "branch3x3_2", 320, 3, strides=2)
        seven = _conv(_conv(x, "branch7x7x3_1", 192), "branch7x7x3_2", 192, (1, 7))
        seven = _conv(_conv(seven, "branch7x7x3_3", 192, (7, 1)), "branch7x7x3_4", 192, 3, strides=2)
        return jnp.concatenate([three, seven, _shrink(x)], -1)


class _BlockE(nn.Module):
    """8 x 8."""

    max_pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _conv(x, "branch1x1", 320)
        three = _conv(x, "branch3x3_1", 384)
        twice = _conv(_conv(x, "branch3x3dbl_1", 448), "branch3x3dbl_2", 384, 3)
        split = [
            _conv(y, f"{name}{part}", 384, kernel)
            for y, name in ((three, "branch3x3_2"), (twice, "branch3x3dbl_3"))
            for part, kernel in (("a", (1, 3)), ("b", (3, 1)))
        ]
        pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.max_pool else _average(x)
        return jnp.concatenate([one, *split, _conv(pooled, "branch_pool", 192)], -1)


class _Logits(nn.Module):
    """A dense layer; returns its output without and with the bias."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], NUM_CLASSES))
        unbiased = jnp.dot(x, kernel, precision=_EXACT)
        return unbiased, unbiased + self.param("bias", nn.initializers.zeros_init(), (NUM_CLASSES,))[None]


class Network(nn.Module):
    """The network; parameters have the names of the PyTorch modules, kernels are (rows, columns, in, out)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Returns the outputs that `layers` lists, for float32 (B, 299, 299, 3) in about [-1, 1]."""
        x = _conv(x, "Conv2d_1a_3x3", 32, 3, strides=2)
        x = _conv(x, "Conv2d_2a_3x3", 32, 3, padding="VALID")
        x = first = _shrink(_conv(x, "Conv2d_2b_3x3", 64, 3))
        x = _conv(_conv(x, "Conv2d_3b_1x1", 80), "Conv2d_4a_3x3", 192, 3, padding="VALID")
        x = second = _shrink(x)
        x = _BlockA(32, name="Mixed_5b")(x)
        x = _BlockA(64, name="Mixed_5c")(x)
        x = _BlockA(64, name="Mixed_5d")(x)
        x = _BlockB(name="Mixed_6a")(x)
        x, _ = _BlockC(128, name="Mixed_6b")(x)
        x, _ = _BlockC(160, name="Mixed_6c")(x)
        x, places = _BlockC(160, name="Mixed_6d")(x)
        x, _ = _BlockC(192, name="Mixed_6e")(x)
        third = x
        x = _BlockD(name="Mixed_7a")(x)
        x = _BlockE(max_pool=False, name="Mixed_7b")(x)
        x = _BlockE(max_pool=True, name="Mixed_7c")(x)
        found = {str(each.shape[-1]): each.mean((1, 2)) for each in (first, second, third, x)}
        unbiased, biased = _Logits(name="fc")(found["2048"])
        return found | {
            "spatial": places[..., :SPATIAL_CHANNELS].reshape(len(places), NUM_SPATIAL),
            "logits_unbiased": unbiased,
            "logits": biased,
        }


def resize(x: jax.Array) -> jax.Array:
    """TF1's bilinear resize of (B, H, W, C) to float32 (B, 299, 299, C).

    Output pixel i interpolates the two pixels around i * H / 299, without antialiasing.
    """
    for axis in (2, 1):  # columns first, which rounds as TensorFlow does
        size = x.shape[axis]
        at = np.arange(IMAGE_SIZE, dtype=np.float32) * (np.float32(size) / np.float32(IMAGE_SIZE))
        low = np.minimum(at.astype(np.int32), size - 1)
        one, other = (jnp.take(x, np.minimum(low + i, size - 1), axis).astype(jnp.float32) for i in (0, 1))
        x = one + (other - one) * (at - low).reshape((1,) * axis + (-1,) + (1,) * (3 - axis))
    return x


def layers(params: Any, images: jax.Array) -> dict[str, jax.Array]:
    """The outputs of the network, float32, under the names of torch-fidelity.

    Args:
      params: of `Network`.
      images: uint8 (B, H, W, 3).

    Returns:
      "64", "192", "768", "2048": spatial means of the activations after the two poolings, before Mixed_7a and at the
      end, (B, number in the name). "logits_unbiased", "logits": (B, 1008); Inception Scores use the first. "spatial":
      the first 7 channels of Mixed_6d.branch1x1 (mixed_6/conv in TensorFlow), (B, 17 * 17 * 7), ordered (row, column,
      channel).
    """
    found: Any = Network().apply({"params": params}, (resize(images) - 128.0) / 128.0)
    return found


@functools.cache
def kernel_shapes() -> dict[str, tuple[int, ...]]:
    """The shape of every layer's kernel by the layer's name, with dots."""
    image = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    params = jax.eval_shape(Network().init, numerics.key(0), image)["params"]
    flat = traverse_util.flatten_dict(params, sep=".")
    return {path.removesuffix(".kernel"): leaf.shape for path, leaf in flat.items() if path.endswith(".kernel")}


class Inception:
    """The network with its weights on all devices of this process; a `FeatureExtractor`.

    Attributes:
      checksum: SHA-256 of its weights.
      batch_size: images per device. Batches are padded to it, so that there is one program per image size, and a row
        depends neither on the other images nor on the number of devices.
    """

    name = "inception"
    image_size = IMAGE_SIZE
    num_features = NUM_FEATURES
    num_classes = NUM_CLASSES
    num_spatial = NUM_SPATIAL

    @numerics.pinned()
    def __init__(self, params: Any, checksum: str, *, batch_size: int = 32) -> None:
        """Puts a parameter tree of `Network` on the devices; see `inception_file.open_inception`."""
        self.checksum, self.batch_size = checksum, batch_size
        mesh = Mesh(jax.local_devices(), ("batch",))
        self._rows = NamedSharding(mesh, PartitionSpec("batch"))
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        # shard_map runs the same program on each device, independent of the compiler's partitioning.
        self._forward = memory.Checked(
            jax.jit(
                jax.shard_map(
                    _forward,
                    mesh=mesh,
                    in_specs=(PartitionSpec(), PartitionSpec("batch")),
                    out_specs=PartitionSpec("batch"),
                )
            ),
            "the Inception network",
        )

    @numerics.pinned()
    def extract(self, images: np.ndarray) -> Extracted:
        """Returns features, logits without bias, and 17 x 17 x 7 spatial features (see `layers`).

        Devices wait for the host at the end of each call, so give many images at once.

        Args:
          images: uint8 (N, H, W, 1 or 3) of any size; grey images are repeated to three channels.

        Raises:
          ValueError: another type or shape.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not all(images.shape[1:]):
            raise ValueError(f"images are {images.dtype} {images.shape}: expected uint8 (N, H, W, 1 or 3)")
        total = len(images)
        found = [np.empty((total, width), np.float32) for width in (NUM_FEATURES, NUM_CLASSES, NUM_SPATIAL)]
        rows = self.batch_size * self._rows.mesh.size
        starts = range(0, total, rows)
        outputs = (self._forward(self._params, self._batch(images[start : start + rows], rows)) for start in starts)
        # A batch is read back after the next one is dispatched.
        for start, (output, _) in zip(starts, itertools.pairwise(itertools.chain(outputs, [None])), strict=True):
            for whole, part in zip(found, output, strict=True):
                whole[start : start + rows] = np.asarray(part)[: total - start]
        return Extracted(*found)

    def network_alone(self) -> tuple[Callable[[jax.Array], Any], jax.Array]:
        """For benchmarks: the network as in `extract` but without the resize, and a random input batch."""
        mesh = self._rows.mesh
        program = jax.jit(
            jax.shard_map(
                lambda params, x: Network().apply({"params": params}, x),
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec("batch")),
                out_specs=PartitionSpec("batch"),
            )
        )
        shape = (self.batch_size * mesh.size, IMAGE_SIZE, IMAGE_SIZE, 3)
        made = jax.device_put(np.random.default_rng(0).standard_normal(shape, np.float32), self._rows)
        return lambda x: program(self._params, x), made

    def _batch(self, images: np.ndarray, rows: int) -> jax.Array:
        """Pads to `rows` images with three channels, on the devices."""
        colour = np.broadcast_to(images, (*images.shape[:3], 3))
        return jax.device_put(np.pad(colour, ((0, rows - len(images)), (0, 0), (0, 0), (0, 0))), self._rows)


def _forward(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
    """The fields of `Extracted`."""
    found = layers(params, images)
    return found["2048"], found["logits_unbiased"], found["spatial"]
