"""Orders, mask ratios, generation plans, and gathers whose gradients are gathers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marjax import orders


def test_orders_are_permutations_and_all_positions_come_first_alike():
    order = np.asarray(orders.draw_orders(jax.random.key(0), 4000, 8))
    assert (np.sort(order, axis=1) == np.arange(8)).all()
    assert np.abs(np.bincount(order[:, 0]) / 4000 - 1 / 8).max() < 0.03
    rank = np.asarray(orders.ranks(order))
    assert (np.take_along_axis(order, rank, 1) == np.arange(8)).all()


@pytest.mark.parametrize("num_tokens", [16, 64, 256])
def test_mask_ratio(num_tokens):
    ratio = orders.MaskRatio()
    known = np.asarray(ratio.draw_num_known(jax.random.key(1), 40_000, num_tokens))
    most = orders.max_visible(num_tokens, 0.7)
    assert most == num_tokens - math.ceil(0.7 * num_tokens)
    assert known.min() == 0 and known.max() == most
    assert abs(known.mean() - ratio.expected_known(num_tokens)) < 0.03 * known.mean()


def test_mask_ratio_per_batch_is_one_for_all_and_per_image_is_not():
    def draw(per):
        return np.asarray(orders.MaskRatio(per=per).draw_num_known(jax.random.key(2), 64, 256))

    assert len(set(draw("batch"))) == 1 and len(set(draw("image"))) > 10


@pytest.mark.parametrize("num_tokens, num_iter", [(64, 8), (256, 64), (256, 256), (16, 1), (1, 1), (100, 99)])
def test_plan_takes_at_least_one_token_a_step_and_all_in_the_end(num_tokens, num_iter):
    plan = orders.generation_plan(num_tokens, num_iter)
    assert len(plan) == num_iter + 1 and plan[0] == 0 and plan[-1] == num_tokens
    assert (np.diff(plan) >= 1).all()


@pytest.mark.parametrize("num_iter", [0, -1, 17])
def test_plan_refuses(num_iter):
    with pytest.raises(ValueError, match="16 tokens: give 1 to 16"):
        orders.generation_plan(16, num_iter)


def test_guidance_counts_one_token_as_unknown_in_the_last_step():
    plan = orders.generation_plan(64, 8)
    linear = orders.guidance_scales(plan, 3.0, "linear")
    assert linear[0] == 1.0 + 2.0 * plan[1] / 64 and linear[-1] == 1.0 + 2.0 * 63 / 64
    assert (orders.guidance_scales(plan, 3.0, "constant") == 3.0).all()
    with pytest.raises(ValueError, match="'linear' or 'constant'"):
        orders.guidance_scales(plan, 3.0, "cosine")


def cost(known_slots, new_slots):
    return 20 + known_slots + 3 * new_slots


@pytest.mark.parametrize("all_unknown", [False, True])
@pytest.mark.parametrize("num_iter, max_stages", [(1, 3), (6, 1), (7, 2), (8, 3), (9, 9), (8, 20)])
def test_stages_cover_the_plan_at_the_least_cost(num_iter, max_stages, all_unknown):
    plan = orders.generation_plan(32, num_iter)
    stages = orders.group_stages(plan, max_stages, cost, all_unknown=all_unknown)
    slots = 32 - np.array(plan[:-1]) if all_unknown else np.diff(plan)
    assert len(stages) <= max_stages
    assert sum((s.start for s in stages), ()) == plan[:-1]
    assert sum((s.num_predicted for s in stages), ()) == tuple(np.diff(plan))
    assert [s.first_step for s in stages] == [plan.index(s.start[0]) for s in stages]

    def padded(cuts):
        total = 0
        for a, b in itertools.pairwise((0, *cuts, num_iter)):
            total += (b - a) * cost(plan[b - 1], max(slots[a:b]))
        return total

    every = [cuts for n in range(min(max_stages, num_iter)) for cuts in itertools.combinations(range(1, num_iter), n)]
    assert sum(len(s.start) * cost(s.known_slots, s.new_slots) for s in stages) == min(map(padded, every))


def test_equal_costs_are_one_stage():
    assert len(orders.group_stages(range(33), 6, lambda known, new: 7.0)) == 1


def test_take_and_its_gradient():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 7, 5)), jnp.float32)
    order = jnp.asarray(np.argsort(rng.random((3, 7))))
    chosen = order[:, :4].at[0, 1].set(7)  # one out of range
    inverse = jnp.where(orders.ranks(order) < 4, orders.ranks(order), 4).at[0, order[0, 1]].set(4)

    def plain(x):
        padded = jnp.concatenate([x, jnp.zeros((3, 1, 5))], axis=1)
        return jnp.stack([row[index] for row, index in zip(padded, chosen, strict=True)])

    np.testing.assert_array_equal(orders.take(x, chosen, inverse), plain(x))
    weight = jnp.asarray(rng.standard_normal((3, 4, 5)), jnp.float32)
    ours = jax.grad(lambda x: (orders.take(x, chosen, inverse) * weight).sum())(x)
    np.testing.assert_array_equal(ours, jax.grad(lambda x: (plain(x) * weight).sum())(x))


def test_take_compiles_to_no_scatter():
    x, index = jnp.ones((2, 8, 4)), jnp.tile(jnp.arange(8), (2, 1))
    text = jax.jit(jax.grad(lambda x: orders.take(x, index, index).sum())).lower(x).as_text()
    assert "gather" in text and "scatter" not in text
