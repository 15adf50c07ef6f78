"""How many floating point operations the algorithm needs, counted by hand.

Only useful work counts: visible tokens in the encoder, keys that a query may look at, unknown tokens in the head, the
tokens of the step in the sampler; never padding, recomputation or elementwise work. A multiply and an add are two
operations. Backbones and heads count their own. (XLA's count takes a scan's body once.)
"""

from collections.abc import Sequence
from typing import Any


def stack_flops(width: int, depth: int, mlp_ratio: float, length: float, pairs: float | None = None) -> float:
    """Forward pass of `depth` Transformer blocks over one sequence, every query looking at all keys.

    `pairs` is the number of queries times keys where it is another than length^2.
    """
    weights = (4 + 2 * mlp_ratio) * width**2
    return depth * (2 * weights * length + 4 * (length**2 if pairs is None else pairs) * width)


def train_flops(generator: Any) -> float:
    """One training step for one image: three times the expected forward pass."""
    backbone, head = generator.backbone, generator.head
    return 3 * (backbone.train_flops() + backbone.unknown_in_training() * head.loss_flops())


def sample_flops(generator: Any, plan: Sequence[int], num_sampling_steps: str, guided: bool,
                 confidence_order: bool = False) -> float:
    """Generation of one image by a plan (`orders.generation_plan`), both branches of guidance included.

    In an order by confidence the head has to look at every unknown token at every step.
    """
    drawn = sum(plan[-1] - known for known in plan[:-1]) if confidence_order else plan[-1]
    backbone = sum(generator.backbone.step_flops(known) for known in plan[:-1])
    return (2 if guided else 1) * (backbone + drawn * generator.head.sample_flops(num_sampling_steps))
