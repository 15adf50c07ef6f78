"""What a config can choose: the paper's variants as combinations of three choices, and the heads by what they need.

Whoever must tell them apart asks for a property here, never for a name. Registered backbones and heads
(`marjax.register`) state their properties as class attributes of the same names.
"""

import dataclasses
from typing import Any

from marjax.registry import Choices


@dataclasses.dataclass(frozen=True)
class Variant:
    """How an image becomes a sequence of predictions (paper, section 4.1 and table 1)."""

    order: str  # "raster" or "random": a key of `orders.ORDERS`
    attention: str  # "causal" or "bidirectional": a key of `models.generator.BACKBONES`
    many: bool  # whether a generation step may predict several tokens
    any_next: bool  # whether any token may come next, so that the order can be made on the fly


def _variant(name: str, backbone: Any) -> Variant:
    """That of a registered backbone, which is chosen by its name."""
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
    """What a head needs of its surroundings."""

    discrete: bool  # it models codes: the tokenizer must have a codebook
    ranks: bool  # it can tell how sure it is of a token (`sample_ranked`)
    schedule: str  # of the learning rate, where the config names none (paper, appendix B)


def _head(name: str, head: Any) -> Head:
    del name
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
