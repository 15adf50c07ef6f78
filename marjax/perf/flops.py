"""Model FLOPs, counted by hand.

Only useful work counts: visible tokens in the encoder, keys that a query may attend to, unknown tokens in the head, the
current step's tokens in the sampler; no padding, recomputation or elementwise work. A multiply-add is two operations.
Backbones and heads count their own FLOPs. (XLA's cost analysis counts the body of a scan once.)
"""

from collections.abc import Sequence
from typing import Any


def stack_flops(width: int, depth: int, mlp_ratio: float, length: float, pairs: float | None = None) -> float:
    """FLOPs of the forward pass of `depth` Transformer blocks over one sequence.

    `pairs` is the number of attended pairs of query and key, by default length^2.
    """
    weights = (4 + 2 * mlp_ratio) * width**2
    return depth * (2 * weights * length + 4 * (length**2 if pairs is None else pairs) * width)


def train_flops(generator: Any) -> float:
    """FLOPs of a training step per image: three times the expected forward pass."""
    backbone, head = generator.backbone, generator.head
    unknown = counted(backbone, "unknown_in_training")
    return 3 * (counted(backbone, "train_flops") + unknown * counted(head, "loss_flops"))


def sample_flops(
    generator: Any, plan: Sequence[int], num_sampling_steps: str, guided: bool, confidence_order: bool = False
) -> float:
    """FLOPs of generating one image by a plan (`generation.plan`), with both branches of cfg.

    With `confidence_order` the head evaluates every unknown token in every step.
    """
    drawn = sum(plan[-1] - known for known in plan[:-1]) if confidence_order else plan[-1]
    backbone = sum(counted(generator.backbone, "step_flops", known) for known in plan[:-1])
    return (2 if guided else 1) * (backbone + drawn * counted(generator.head, "sample_flops", num_sampling_steps))


def counted(part: Any, method: str, *args: Any) -> float:
    """FLOPs by a backbone's or head's own count; 0 if a registered one has none."""
    count = getattr(part, method, None)
    return 0.0 if count is None else count(*args)


def autoencoder_flops(spec: Any, image_size: int) -> tuple[float, float]:
    """FLOPs of encoding and of decoding one square image by an autoencoder (`tokenizers.spec.Spec`).

    Padding of convolutions counts as data.
    """

    def conv(inside: int, outside: int, size: int, side: float) -> float:
        return 2 * size**2 * inside * outside * side**2

    def block(inside: int, outside: int, side: float) -> float:
        shortcut = conv(inside, outside, 1, side) if inside != outside else 0
        return conv(inside, outside, 3, side) + conv(outside, outside, 3, side) + shortcut

    def attention(width: int, side: float) -> float:
        return 4 * conv(width, width, 1, side) + 4 * side**4 * width

    levels = [spec.width * mult for mult in spec.channel_mults]
    sides = [image_size / 2**level for level in range(len(levels))]
    last, low, halves = levels[-1], sides[-1], 1 if spec.num_codes else 2
    middle = 2 * block(last, last, low) + attention(last, low)

    encode, inside = conv(spec.in_channels, spec.width, 3, sides[0]), spec.width
    for level, (width, side) in enumerate(zip(levels, sides, strict=True)):
        for _ in range(spec.num_res_blocks):
            encode += block(inside, width, side) + spec.has_attention("encoder", level) * attention(width, side)
            inside = width
        if level < len(levels) - 1:
            encode += conv(width, width, 3, sides[level + 1])
    encode += middle + conv(last, halves * spec.latent_channels, 3, low)
    encode += conv(halves * spec.latent_channels, halves * spec.embed_dim, 1, low)

    decode = conv(spec.embed_dim, spec.latent_channels, 1, low) + conv(spec.latent_channels, last, 3, low) + middle
    inside = last
    for level in reversed(range(len(levels))):
        width, side = levels[level], sides[level]
        for _ in range(spec.num_res_blocks + 1):
            decode += block(inside, width, side) + spec.has_attention("decoder", level) * attention(width, side)
            inside = width
        if level:
            decode += conv(width, width, 3, sides[level - 1])
    return encode, decode + conv(spec.width * spec.channel_mults[0], spec.in_channels, 3, sides[0])
