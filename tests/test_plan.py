"""The generation plan: tokens per step, cfg scales, and stages of one padded shape."""

import itertools

import numpy as np
import pytest

from marjax.generation.plan import cfg_scales, generation_plan, group_stages


@pytest.mark.parametrize("num_tokens, num_iter", [(64, 8), (256, 64), (256, 256), (16, 1), (1, 1), (100, 99)])
def test_plan_predicts_at_least_one_token_per_step_and_all_in_total(num_tokens, num_iter):
    plan = generation_plan(num_tokens, num_iter)
    assert len(plan) == num_iter + 1 and plan[0] == 0 and plan[-1] == num_tokens
    assert (np.diff(plan) >= 1).all()


@pytest.mark.parametrize("num_iter", [0, -1, 17])
def test_invalid_num_iter(num_iter):
    with pytest.raises(ValueError, match="num_iter.*16"):
        generation_plan(16, num_iter)


def test_linear_cfg_counts_one_token_as_unknown_in_the_last_step():
    plan = generation_plan(64, 8)
    linear = cfg_scales(plan, 3.0, "linear")
    assert linear[0] == 1.0 + 2.0 * plan[1] / 64 and linear[-1] == 1.0 + 2.0 * 63 / 64
    assert (cfg_scales(plan, 3.0, "constant") == 3.0).all()
    with pytest.raises(ValueError, match="cfg_schedule"):
        cfg_scales(plan, 3.0, "cosine")


def cost(known_slots, new_slots):
    return 20 + known_slots + 3 * new_slots


@pytest.mark.parametrize("all_unknown", [False, True])
@pytest.mark.parametrize("num_iter, max_stages", [(1, 3), (6, 1), (7, 2), (8, 3), (9, 9), (8, 20)])
def test_stages_cover_the_plan_at_the_least_cost(num_iter, max_stages, all_unknown):
    plan = generation_plan(32, num_iter)
    stages = group_stages(plan, max_stages, cost, all_unknown=all_unknown)
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


def test_equal_costs_give_one_stage():
    assert len(group_stages(range(33), 6, lambda known, new: 7.0)) == 1
