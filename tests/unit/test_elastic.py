"""The controller of elastic budgets: what it may choose, how it moves, what overrides it."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit_builders import make_profile

from eos_vllm.core.budget import Share, tokens_of
from eos_vllm.core.errors import BudgetError, SettingError
from eos_vllm.core.plan import Planner
from eos_vllm.serving.elastic import Elastic, least_of, levels, parse_range
from eos_vllm.serving.metrics import Counters
from eos_vllm.serving.scheduler import EosSchedulerMixin

PLANNER = Planner(make_profile(visual=576), block=32, elastic=(32, 256))
ROOM = 10_000


def controller() -> Elastic:
    return Elastic(levels(PLANNER, 32, 256), [40, 30, 20, 10])


def test_ranges_are_read() -> None:
    assert parse_range("64:192") == (64, 192)
    assert parse_range("10%:0.4") == (Share(0.1), Share(0.4))


@pytest.mark.parametrize("text", ["64", "", "192:64", "64:64", "64:40%", "a:b", "64:", "0:9"])
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises((SettingError, BudgetError), match="eos-elastic="):
        parse_range(text)


def test_levels_go_down_in_equal_ratios_and_differ_in_what_they_keep() -> None:
    assert levels(PLANNER, 32, 256) == (256, 128, 64, 32)
    near = levels(PLANNER, 33, 36)
    assert len({PLANNER.counts(budget) for budget in near}) == len(near) < 4  # rounded to blocks some are alike


def test_it_goes_down_with_each_arrival_that_finds_others_waiting_and_up_when_calm() -> None:
    elastic = controller()
    assert [elastic.choose(behind, ROOM) for behind in (0, 1, 2, 3, 9, 9)] == [256, 256, 128, 64, 32, 32]
    assert [elastic.choose(0, ROOM) for _ in range(13)] == [32] * 3 + [64] * 4 + [128] * 4 + [256] * 2
    elastic = controller()
    elastic.choose(2, ROOM)
    # One that waits is no reason to go down, and none to go up.
    assert {elastic.choose(behind, ROOM) for behind in (0, 0, 0, 1, 0, 0, 0, 1)} == {128}


def test_what_waits_has_to_fit_into_the_cache() -> None:
    elastic = controller()
    assert elastic.choose(0, 45) == 256
    assert elastic.choose(0, 44) == 128  # a tenth stays free
    assert elastic.choose(1, 45) == 64
    assert elastic.choose(0, 1) == 32


def test_a_known_image_keeps_its_budget() -> None:
    elastic = controller()
    assert elastic.choose(0, ROOM, ["a"]) == 256
    for _ in range(4):
        elastic.choose(9, ROOM, ["b"])
    assert elastic.choose(9, ROOM, ["a"]) == 256
    assert elastic.choose(9, ROOM, ["c"]) == 32


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 200), st.integers(1, 300)), max_size=30))
def test_a_requests_own_floor_holds(arrivals: list[tuple[int, int, int]]) -> None:
    elastic = controller()
    for behind, free, least in arrivals:
        budget = elastic.choose(behind, free, least=least)
        assert tokens_of(budget, 1) >= min(least, 256)


def test_a_floor_that_is_none_does_not_end_the_engine() -> None:
    """A front end that checks nothing may let it through to the scheduler."""
    params = SimpleNamespace(extra_args={"eos_retain_min": "x"})
    request = SimpleNamespace(sampling_params=params, mm_features=[], request_id="r")
    pool = SimpleNamespace(get_num_free_blocks=lambda: ROOM)
    counters, manager = Counters(1), SimpleNamespace(block_pool=pool)
    scheduler = SimpleNamespace(
        waiting=[], running=[], planner=PLANNER, chosen={}, kv_cache_manager=manager, counters=counters
    )
    EosSchedulerMixin._choose_budget(scheduler, controller(), request)  # type: ignore[arg-type]
    assert params.extra_args["eos_retain"] == scheduler.chosen["r"] == 256
    assert counters.take_increments()["elastic/ceiling"] == 1


def test_floors_of_requests_are_read() -> None:
    assert least_of({"eos_retain_min": "64"}, PLANNER) == 64
    assert least_of({"eos_retain": 64}, PLANNER) is None
    for value in ("10%", 0, "x"):
        with pytest.raises(BudgetError, match="eos_retain_min="):
            least_of({"eos_retain_min": value}, PLANNER)
    with pytest.raises(BudgetError, match="has no --eos-elastic"):
        least_of({"eos_retain_min": 64}, Planner(make_profile(visual=576)))
