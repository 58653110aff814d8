"""Order of cells, and the lists of the command line."""

import pytest

from eos_vllm.core.errors import SettingError
from loadtests.grid import Load, Phase, cells_of, parse_budgets, parse_loads

PHASE = Phase("large", (Load(3, 1), Load(12, 8)), 2)


def test_stock_and_budgets_take_turns_there_and_back() -> None:
    cells = cells_of(PHASE, (64, 16))
    assert [cell.key for cell in cells] == [
        *(f"large/r1/{load}/{setting}" for load in ("c1", "c8") for setting in ("stock", "64", "16")),
        *(f"large/r2/{load}/{setting}" for load in ("c1", "c8") for setting in ("16", "64", "stock")),
    ]
    assert len({cell.key for cell in cells}) == len(cells)


def test_serially_each_server_has_its_turn_once_a_repeat() -> None:
    cells = cells_of(PHASE, (64, 16), serial=True)
    kinds = [cell.kind for cell in cells]
    assert kinds == ["stock"] * 2 + ["eos"] * 8 + ["stock"] * 2
    assert sorted(c.key for c in cells) == sorted(c.key for c in cells_of(PHASE, (64, 16)))


def test_budgets_of_cells() -> None:
    assert [cell.budgets for cell in cells_of(PHASE, (64,))[:2]] == [(), (64,)]


def test_loads() -> None:
    assert parse_loads("1,8", "3,12") == (Load(3, 1), Load(12, 8))
    assert parse_loads("1,8", "5") == (Load(5, 1), Load(5, 8))
    assert parse_loads("1", "5", "0.5,2") == (Load(5, rate=0.5), Load(5, rate=2.0))
    assert [load.name for load in parse_loads("8", "5", "0.5")] == ["rate0.5"]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("1,many", "3"), "concurrency"),
        (("0", "3"), "concurrency"),
        (("1,8", "3,4,5"), "requests"),
        (("1", "none"), "requests"),
        (("1", "0"), "requests"),
        (("1", "3", "-2"), "rate"),
    ],
)
def test_refused_loads(arguments: tuple[str, ...], field: str) -> None:
    with pytest.raises(SettingError) as error:
        parse_loads(*arguments)
    assert error.value.field == field


def test_budgets() -> None:
    assert parse_budgets("576,64") == (576, 64)
    for text in ("64,64", "0", "all"):
        with pytest.raises(SettingError, match="budgets"):
            parse_budgets(text)
