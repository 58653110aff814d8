"""Order of cells, and the lists of the command line."""

import pytest

from eos_vllm.core.errors import SettingError
from loadtests.grid import Load, cells_of, parse_loads, parse_numbers, parse_scenarios

LOADS = (Load(1), Load(8))


def test_stock_and_budgets_take_turns_there_and_back() -> None:
    there, back = (cells_of(("single", "mixed"), LOADS, ("stock", "64", "16"), repeat) for repeat in (1, 2))
    assert [cell.key for cell in there] == [
        f"{scenario}/{load}/{setting}/r1"
        for load in ("c1", "c8")
        for scenario in ("single", "mixed")
        for setting in ("stock", "64", "16")
    ]
    assert [cell.setting for cell in back] == ["16", "64", "stock"] * 4
    assert len({cell.key for cell in (*there, *back)}) == 24


def test_serially_each_server_has_its_turn_once_a_repeat() -> None:
    for repeat, order in ((1, ["stock"] * 2 + ["eos"] * 4), (2, ["eos"] * 4 + ["stock"] * 2)):
        cells = cells_of(("single",), LOADS, ("stock", "64", "16"), repeat, serial=True)
        assert [cell.kind for cell in cells] == order


def test_servers_and_budgets_of_cells() -> None:
    cells = cells_of(("single",), LOADS[:1], ("stock", "stock-restricted", "64"), 1)
    assert [(cell.kind, cell.budgets) for cell in cells] == [("stock", ()), ("stock-restricted", ()), ("eos", (64,))]


def test_loads() -> None:
    assert parse_loads("1,8") == LOADS
    assert parse_loads("1", "0.5,2") == (Load(rate=0.5), Load(rate=2.0))
    assert [load.name for load in parse_loads("8", "0.5")] == ["rate0.5"]
    assert [load.label for load in (*LOADS, Load(rate=0.5))] == ["1 user", "8 users", "0.5 visits/s"]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [(("1,many",), "concurrency"), (("0",), "concurrency"), (("8,8",), "concurrency"), (("1", "-2"), "rates")],
)
def test_refused_loads(arguments: tuple[str, ...], field: str) -> None:
    with pytest.raises(SettingError) as error:
        parse_loads(*arguments)
    assert error.value.field == field


def test_lists() -> None:
    assert parse_numbers("budgets", "576,64", "64") == (576, 64)
    assert parse_scenarios("single, mixed") == ("single", "mixed")
    for text in ("64,64", "0", "all"):
        with pytest.raises(SettingError, match="budgets"):
            parse_numbers("budgets", text, "64")
    for text in ("single,single", "", "burst"):
        with pytest.raises(SettingError, match="scenarios"):
            parse_scenarios(text)
