"""Properties of the paper's variants and of the heads.

Other code tests these properties, never names. Registered backbones and heads (`marjax.register`) define them as class
attributes of the same names.
"""

import dataclasses
from typing import Any

from marjax.registry import Choices


@dataclasses.dataclass(frozen=True)
class Variant:
    """How images are generated autoregressively (paper, section 4.1 and table 1)."""

    order: str  # "raster" or "random": a key of `orders.ORDERS`
    attention: str  # "causal" or "bidirectional": a key of `models.generator.BACKBONES`
    many: bool  # whether a generation step may predict several tokens
    any_next: bool  # whether the next token may be any unknown one: needed for orders by confidence


def _variant(name: str, backbone: Any) -> Variant:
    """The variant of a registered backbone."""
    return Variant(
        order=getattr(backbone, "order", "random"),
        attention=name,
        many=getattr(backbone, "many", False),
        any_next=getattr(backbone, "any_next", False),
    )


VARIANTS = Choices(
    "backbone",
    {
        "ar": Variant(order="raster", attention="causal", many=False, any_next=False),
        "random_ar": Variant(order="random", attention="causal", many=False, any_next=False),
        # One token at a time is `sample.num_iter` = number of tokens.
        "mar": Variant(order="random", attention="bidirectional", many=True, any_next=True),
    },
    _variant,
)


@dataclasses.dataclass(frozen=True)
class Head:
    """Properties of a head."""

    discrete: bool  # models codes: the tokenizer must have a codebook
    ranks: bool  # has `sample_ranked`, the confidence of each token
    schedule: str  # default learning rate schedule (paper, appendix B)


def _head(name: str, head: Any) -> Head:
    return Head(
        discrete=getattr(head, "discrete", False),
        ranks=hasattr(head, "sample_ranked"),
        schedule=getattr(head, "schedule", "constant"),
    )


HEADS = Choices(
    "head",
    {
        "diffusion": Head(discrete=False, ranks=False, schedule="constant"),
        "categorical": Head(discrete=True, ranks=True, schedule="cosine"),
        "regression": Head(discrete=False, ranks=False, schedule="constant"),
    },
    _head,
)
