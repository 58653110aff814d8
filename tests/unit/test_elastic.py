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


def learned(seconds: float = 1.0) -> Elastic:
    """A controller that has seen steps in which the ceiling's request takes ``seconds``."""
    elastic = controller()
    elastic.load.stepped(seconds, 40, decoding=False)
    return elastic


def steady(elastic: Elastic, rate: float, count: int, start: float = 0.0) -> list[object]:
    """Budgets of requests that arrive at equal distances."""
    return [elastic.choose(start + i / rate, 0, ROOM) for i in range(count)]


def test_until_costs_are_known_what_waits_decides() -> None:
    elastic = controller()
    assert [elastic.choose(0.0, behind, ROOM) for behind in (0, 1, 2, 3, 9, 0)] == [256, 256, 128, 64, 32, 256]


@pytest.mark.parametrize(
    # Seconds at the four levels are 1, 0.75, 0.5 and 0.25: the largest that stays below 35 % of the time.
    ("rate", "budget"),
    [(0.1, 256), (0.25, 256), (0.38, 128), (0.55, 64), (0.9, 32), (9.0, 32)],
)
def test_images_take_no_more_than_their_share_of_time(rate: float, budget: int) -> None:
    assert set(steady(learned(), rate, 60)[30:]) == {budget}


def test_time_is_in_proportion() -> None:
    """A machine a hundred times as fast does the same at a hundred times the rate."""
    assert steady(learned(0.01), 60.0, 40) == steady(learned(1.0), 0.6, 40)


def test_it_goes_up_later_than_down() -> None:
    elastic = learned()
    assert steady(elastic, 0.38, 60)[-1] == 128
    end = 60 / 0.38
    assert steady(elastic, 0.27, 60, end)[-1] == 128  # from the ceiling, this rate would be one for the ceiling
    assert steady(learned(), 0.27, 60)[-1] == 256
    assert steady(elastic, 0.2, 60, end + 60 / 0.27)[-1] == 256


def test_who_finds_the_engine_idle_is_no_load() -> None:
    """One client that asks again and again keeps the ceiling, whatever share of the time it takes."""
    elastic = learned()
    assert {elastic.choose(i * 1.05, 0, ROOM, alone=True) for i in range(50)} == {256}
    assert steady(elastic, 2.0, 40, 100.0)[-1] == 32
    later = [elastic.choose(120.0 + i, 0, ROOM, alone=True) for i in range(60)]
    assert later == sorted(later)
    assert (later[0], later[-1]) == (32, 256)


def test_after_a_pause_it_is_at_the_ceiling() -> None:
    elastic = learned()
    assert steady(elastic, 5.0, 40)[-1] == 32
    assert elastic.choose(8.0 + 60, 0, ROOM) == 256


def test_a_burst_goes_down_within_itself() -> None:
    elastic = learned()
    budgets = [elastic.choose(0.0, behind, ROOM) for behind in range(6)]
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[0], budgets[-1]) == (256, 32)


def test_requests_that_name_their_budget_are_part_of_the_load() -> None:
    elastic = learned()
    for i in range(40):
        elastic.load.arrived(i / 2, alone=False, pinned_blocks=40)
    assert elastic.choose(20.0, 0, ROOM) == 32


def test_requests_count_by_what_they_hold() -> None:
    """Eight images are eight times the load of one, a thumbnail is next to none."""
    budgets = []
    for weight in (8.0, 1.0, 0.02):
        elastic = learned()
        for i in range(20):
            budget = elastic.choose(i * 3.0, 0, 100 * ROOM, weight=weight)
        budgets.append(budget)
    assert budgets[0] == 32
    assert budgets[0] < budgets[1] <= budgets[2] == 256


def test_images_that_were_pinned_before_are_no_load() -> None:
    elastic = learned()
    for i in range(40):
        elastic.pinned(i / 2, 40, ["a"], alone=False)
    assert elastic.choose(20.0, 0, ROOM) == 256
    for i in range(40):
        elastic.pinned(20 + i / 2, 40, [f"image {i}"], alone=False)
    assert elastic.choose(40.0, 0, ROOM) == 32


def test_known_images_are_no_load() -> None:
    elastic = learned()
    assert {elastic.choose(i / 50, 0, ROOM, ["a"]) for i in range(100)} == {256}
    assert elastic.choose(2.5, 0, ROOM, ["b"]) == 256


def test_what_decoding_takes_of_a_step_is_not_the_images() -> None:
    load = controller().load
    assert load.share(40, 0) is None
    for _ in range(3):
        load.stepped(0.5, 0, decoding=True)
    load.stepped(1.5, 40, decoding=True)
    assert load.cost == pytest.approx(1.0 / 40)
    for _ in range(20):
        load.stepped(0.4, 40, decoding=True)  # less than a step that only decodes: a tenth of it all the same
    assert load.cost == pytest.approx(0.04 / 40)


def test_what_waits_has_to_fit_into_the_cache() -> None:
    elastic = controller()
    assert elastic.choose(0.0, 0, 45) == 256
    assert elastic.choose(0.0, 0, 44) == 128  # a tenth stays free
    assert elastic.choose(0.0, 1, 45) == 64
    assert elastic.choose(0.0, 0, 1) == 32


def test_a_known_image_keeps_its_budget() -> None:
    elastic = controller()
    assert elastic.choose(0.0, 0, ROOM, ["a"]) == 256
    for _ in range(4):
        elastic.choose(0.0, 9, ROOM, ["b"])
    assert elastic.choose(0.0, 9, ROOM, ["a"]) == 256
    assert elastic.choose(0.0, 9, ROOM, ["c"]) == 32


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 200), st.integers(1, 300)), max_size=30))
def test_a_requests_own_floor_holds(arrivals: list[tuple[int, int, int]]) -> None:
    elastic = controller()
    for behind, free, least in arrivals:
        budget = elastic.choose(0.0, behind, free, least=least)
        assert tokens_of(budget, 1) >= min(least, 256)


def test_a_floor_that_is_none_does_not_end_the_engine() -> None:
    """A front end that checks nothing may let it through to the scheduler."""
    params = SimpleNamespace(extra_args={"eos_retain_min": "x"})
    request = SimpleNamespace(sampling_params=params, mm_features=[], request_id="r")
    pool = SimpleNamespace(get_num_free_blocks=lambda: ROOM)
    counters, manager = Counters(1), SimpleNamespace(block_pool=pool)
    scheduler = SimpleNamespace(
        waiting=[],
        running=[],
        planner=PLANNER,
        chosen={},
        kv_cache_manager=manager,
        counters=counters,
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        _weights={},
        _weight=lambda *_: 1.0,
        _images_of=lambda *_: [],
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
