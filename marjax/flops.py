"""How many floating point operations the algorithm needs, counted by hand.

Only useful work counts: visible tokens in the encoder, unknown tokens in the denoiser, the tokens of the step in the
sampler; never padding, recomputation or elementwise work. A multiply and an add are two operations. (XLA's own count
takes a scan's body once.)
"""

import ml_collections

from marjax import orders
from marjax.heads.diffusion import respaced_timesteps


def stack_flops(width: int, depth: int, mlp_ratio: float, length: float) -> float:
    """Forward pass of `depth` Transformer blocks over one sequence."""
    weights = (4 + 2 * mlp_ratio) * width**2
    return depth * (2 * weights * length + 4 * length**2 * width)


def backbone_flops(model: ml_collections.ConfigDict, num_tokens: int, token_dim: int, num_known: float) -> float:
    """Forward pass of the masked backbone for one image with `num_known` tokens known."""
    width, buffer = model.width, model.buffer_size
    encoded = buffer + num_known
    return (2 * token_dim * width * num_known + stack_flops(width, model.encoder_depth, model.mlp_ratio, encoded)
            + 2 * width**2 * encoded
            + stack_flops(width, model.decoder_depth, model.mlp_ratio, buffer + num_tokens))


def denoiser_flops(model: ml_collections.ConfigDict, token_dim: int) -> tuple[float, float]:
    """Forward pass of the denoiser for one token: the part done once a z, and the part done every timestep."""
    width, depth = model.denoiser.width, model.denoiser.depth
    each = 2 * (token_dim * width + depth * 5 * width**2 + 2 * width**2 + 2 * token_dim * width)
    return 2 * model.width * width, each


def sampling_steps(model: ml_collections.ConfigDict, sample: ml_collections.ConfigDict) -> int:
    """Length of the head's chain in generation."""
    return len(respaced_timesteps(model.diffusion.num_steps, sample.num_sampling_steps))


def train_flops(model: ml_collections.ConfigDict, num_tokens: int, token_dim: int) -> float:
    """One training step for one image: three times the expected forward pass."""
    ratio = model.mask_ratio
    known = orders.MaskRatio(ratio.mean, ratio.std, ratio.minimum).expected_known(num_tokens)
    once, each = denoiser_flops(model, token_dim)
    unknown = num_tokens - known
    return 3 * (backbone_flops(model, num_tokens, token_dim, known)
                + unknown * (once + model.diffusion.batch_mul * each))


def sample_flops(model: ml_collections.ConfigDict, sample: ml_collections.ConfigDict, num_tokens: int,
                 token_dim: int) -> float:
    """Generation of one image, both branches of guidance included."""
    plan = orders.generation_plan(num_tokens, sample.num_iter)
    once, each = denoiser_flops(model, token_dim)
    steps = sampling_steps(model, sample)
    backbone = sum(backbone_flops(model, num_tokens, token_dim, known) for known in plan[:-1])
    branches = 1 if sample.cfg == 1.0 else 2
    return branches * (backbone + num_tokens * (once + steps * each))
