"""What a config can choose: the paper's variants as combinations of three choices, and the heads by what they need.

Whoever must tell them apart asks for a property here, never for a name.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Variant:
    """How an image becomes a sequence of predictions (paper, section 4.1 and table 1)."""

    order: str  # "raster" or "random": a key of `orders.ORDERS`
    attention: str  # "causal" or "bidirectional": a key of `models.generator.BACKBONES`
    many: bool  # whether a generation step may predict several tokens
    any_next: bool  # whether any token may come next, so that the order can be made on the fly


VARIANTS = {
    "ar": Variant(order="raster", attention="causal", many=False, any_next=False),
    "random_ar": Variant(order="random", attention="causal", many=False, any_next=False),
    # One token at a time is `sample.num_iter` = number of tokens.
    "mar": Variant(order="random", attention="bidirectional", many=True, any_next=True),
}


@dataclasses.dataclass(frozen=True)
class Head:
    """What a head needs of its surroundings."""

    discrete: bool  # it models codes: the tokenizer must have a codebook
    ranks: bool  # it can tell how sure it is of a token (`sample_ranked`)
    schedule: str  # of the learning rate, where the config names none (paper, appendix B)


HEADS = {
    "diffusion": Head(discrete=False, ranks=False, schedule="constant"),
    "categorical": Head(discrete=True, ranks=True, schedule="cosine"),
    "regression": Head(discrete=False, ranks=False, schedule="constant"),
}
