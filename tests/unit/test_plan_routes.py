"""``POST /eos/plan`` and ``GET /eos/choices``: the figures of the command line, bounds, and no input that breaks it."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from cli_runs import output
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from eos_vllm import profiles
from eos_vllm.analysis.choices import choices
from eos_vllm.core.plan import Planner
from eos_vllm.models import embedded
from eos_vllm.models.geometry import geometry
from eos_vllm.page import plan_routes
from eos_vllm.page.plan import PlanContext
from eos_vllm.page.plan_documents import MOST_BUDGETS
from eos_vllm.page.plan_routes import MOST_BYTES

SEARCHED, SHARED = "embedded-searched", "embedded-shared-image"
SIZES = geometry(str(embedded.path()))


def client(profile: str, sizes: Any = SIZES, **more: Any) -> TestClient:
    app = FastAPI()
    app.include_router(plan_routes.router)
    planner = more.pop("planner", None) or Planner(profiles.load(profile), block=16)
    app.state.eos_plan = PlanContext(planner, sizes, more.pop("model", "embedded"), **more)
    return TestClient(app, raise_server_exceptions=False)


QWEN = client(
    "fastv-qwen2.5-vl-7b",
    geometry({"model_type": "qwen2_5_vl", "text_config": {"num_hidden_layers": 28}}),
    planner=Planner(profiles.load("fastv-qwen2.5-vl-7b"), block=16, example=1000),
    size_tokens=lambda width, height: max(1, width * height // 784),
    model="qwen",
)
CLIENTS = [client(SEARCHED), client(SHARED), QWEN]


@pytest.mark.parametrize("profile", [SEARCHED, SHARED, "embedded-divprune", "embedded-sparsevlm-v2"])
@pytest.mark.parametrize("images", [1, 3])
def test_the_figures_are_those_of_the_command_line(
    profile: str, images: int, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = [192, "20%", 576]

    def told(text: int) -> list[dict[str, Any]]:
        asked = ["--retain", *map(str, budgets), "--text-tokens", str(text), "--images", str(images), "--json"]
        found = json.loads(output(capsys, "plan", "--profile", profile, "--model", str(embedded.path()), *asked))
        return found["plans"]

    for answer_tokens in (0, 300):
        body = {"budgets": budgets, "text_tokens": 50, "output_tokens": answer_tokens, "images": images}
        found = client(profile).post("/eos/plan", json=body).json()
        for plan, prompt, held in zip(found["plans"], told(50), told(50 + answer_tokens), strict=True):
            reduced, stock = held["reduced"], held["stock"]
            assert (plan["budget"], plan["counts"]) == (prompt["budget"], prompt["counts"])
            assert plan["layer_average"] == prompt["layer_average"]
            assert (plan["final"], plan["kv_share"]) == (prompt["final"], prompt["visual_kv_ratio"])
            assert (plan["prefill_flops"], plan["flops_share"]) == (prompt["reduced"]["flops"], prompt["flops_ratio"])
            assert (plan["kv_blocks"], plan["kv_bytes"]) == (reduced["blocks"], reduced["allocated_bytes"])
            assert (plan["held_share"], plan["layer_tokens"]) == (held["kv_ratio"], reduced["layers"]["tokens"])
            assert [[s["layer_from"], s["tokens"], s["kv_blocks"]] for s in plan["segments"]] == [
                [s["first_layer"], s["tokens"], s["blocks"]] for s in reduced["segments"]
            ]
            assert found["stock"] == {
                "tokens": 576 * images + 50 + answer_tokens,
                "layer_tokens": stock["layers"]["tokens"],
                "kv_blocks": stock["blocks"],
                "kv_bytes": stock["allocated_bytes"],
                "prefill_flops": prompt["stock"]["flops"],
            }


def test_a_budget_of_null_is_the_servers_own() -> None:
    mine = client(SEARCHED, planner=Planner(profiles.load(SEARCHED), 96, 16))
    null, named = mine.post("/eos/plan", json={"budgets": [None, 96]}).json()["plans"]
    assert null == named
    assert null["layers"] == [2, 3, 5]
    assert client(SHARED).post("/eos/plan", json={"budgets": [64]}).json()["plans"][0]["layers"] == [-1, 5]


def test_the_tokens_of_an_image_of_any_size() -> None:
    def plan(**more: Any) -> Any:
        return QWEN.post("/eos/plan", json={"budgets": ["50%"], **more}).json()

    assert plan()["visual_tokens"] == 1000
    assert plan(visual_tokens=500)["visual_tokens"] == 500
    assert plan(size=[1568, 784])["visual_tokens"] == 1568
    assert plan(size=[1568, 784])["stock"] == plan(visual_tokens=1568)["stock"]
    assert plan(size=[10, 10], visual_tokens=3)["error"].startswith("size=[10, 10]: visual_tokens says it already")
    assert client(SEARCHED).post("/eos/plan", json={"budgets": [64], "size": [9, 9]}).json()["visual_tokens"] == 576
    unknown = client("fastv-qwen2.5-vl-7b", SIZES).post("/eos/plan", json={"budgets": ["50%"], "size": [9, 9]})
    assert "not known here" in unknown.json()["error"]


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ({}, "budgets={}: Field required; give budgets, text_tokens"),
        ({"budgets": []}, "budgets=[]: List should have at least 1 item"),
        ({"budgets": [64] * (MOST_BUDGETS + 1)}, "List should have at most 8 items"),
        ({"budgets": [64, 0]}, "budgets=0: a retain budget is at least 1"),
        ({"budgets": [True]}, "budgets.0=True: Input should be a valid integer"),
        ({"budgets": ["200%"]}, "budgets='200%': this is no whole number, and no share"),
        ({"budgets": [64], "images": 0}, "images=0: Input should be greater than or equal to 1"),
        ({"budgets": [64], "images": 10**9}, "images=1000000000: Input should be less than or equal to 64"),
        ({"budgets": [64], "text_tokens": -1}, "text_tokens=-1"),
        ({"budgets": [64], "output_tokens": 10**12}, "output_tokens=1000000000000"),
        ({"budgets": [64], "visual_tokens": 99}, "visual_tokens=99: each image has 576 visual tokens"),
        ({"budgets": [64], "size": [0, 5]}, "size=[0, 5]: no image is of that size"),
        ({"budgets": [64], "colour": "red"}, "colour='red': Extra inputs are not permitted"),
        ([], "body=[]: Input should be an object"),
    ],
)
def test_a_mistake_is_one_line(body: Any, line: str) -> None:
    answer = CLIENTS[0].post("/eos/plan", json=body)
    assert answer.status_code == 400
    assert line in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_a_body_is_bounded_and_has_to_be_json() -> None:
    assert CLIENTS[0].post("/eos/plan", content=b" " * (MOST_BYTES + 1)).status_code == 400
    for content in (b"", b"{", b"\xff\xfe", b"[" * MOST_BYTES, b'{"budgets": [NaN]}', b'{"budgets": [1e999]}'):
        assert CLIENTS[0].post("/eos/plan", content=content).status_code == 400


def test_the_key_is_asked_for() -> None:
    guarded = client(SEARCHED)
    guarded.app.state.eos_guard = SimpleNamespace(verify_token=lambda h: h.get("authorization") == "Bearer k")
    for ask in (
        lambda **o: guarded.post("/eos/plan", json={"budgets": [64]}, **o),
        lambda **o: guarded.get("/eos/choices", **o),
    ):
        assert (ask().status_code, ask().json()) == (401, {"error": "Unauthorized"})
        assert ask(headers={"Authorization": "Bearer other"}).status_code == 401
        assert ask(headers={"Authorization": "Bearer k"}).status_code == 200


def test_points_that_can_be_asked_of_this_server() -> None:
    def served(profile: str) -> set[tuple[str, int]]:
        found = client(profile).get("/eos/choices").json()["points"]
        assert len(found) == len(choices().points)
        return {(p["profile"], p["budget"]) for p in found if p["served_here"]}

    # Its budgets mean what is left; the point at a layer average of 256 is another one, by another measure.
    assert served(SEARCHED) == {(SEARCHED, budget) for budget in (192, 128, 96, 64, 32, 16)}
    assert served(SHARED) == {(SHARED, budget) for budget in (256, 192, 128, 64, 32, 16)}
    assert served("embedded-divprune") == {("maxmin", budget) for budget in (256, 192, 128, 64, 32, 16)}
    assert served("embedded-eos") == set()
    # What this server keeps is rounded to its blocks, what was measured is not.
    planner = Planner(profiles.load(SEARCHED), block=16)
    for point in client(SEARCHED).get("/eos/choices").json()["points"]:
        here = list(planner.counts(point["budget"])) if point["served_here"] else None
        assert point["counts_here"] == here


def test_the_recommendation_is_that_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    query = {"kv_gib": 1, "concurrency": 64, "accuracy_floor": 0.95}
    found = CLIENTS[0].get("/eos/choices", params=query).json()["recommendation"]
    told = json.loads(
        output(capsys, "advise", "--kv-gib", "1", "--concurrency", "64", "--accuracy-floor", "0.95", "--json")
    )
    assert told.pop("model") == "embedded"
    assert found == told
    assert CLIENTS[0].get("/eos/choices").json()["recommendation"] is None


@pytest.mark.parametrize(
    ("query", "line"),
    [
        ({"kv_gib": 1}, "concurrency"),
        ({"kv_gib": "nan", "concurrency": 1, "accuracy_floor": 0.5}, "kv-gib=nan"),
        ({"kv_gib": 1, "concurrency": 1, "accuracy_floor": 95}, "accuracy-floor=95.0: a floor is a share"),
        ({"kv_gib": 1, "concurrency": 1, "accuracy_floor": 0.9, "profile": "x"}, "profile='x': nothing was measured"),
        ({"size": 1}, "kv_gib"),
    ],
)
def test_a_wrong_parameter_is_one_line(query: dict[str, Any], line: str) -> None:
    answer = CLIENTS[0].get("/eos/choices", params=query)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(line)


def test_nothing_is_recommended_where_nothing_was_measured() -> None:
    query = {"kv_gib": 1, "concurrency": 64, "accuracy_floor": 0.95}
    assert "images have any number of tokens" in QWEN.get("/eos/choices", params=query).json()["error"]
    assert not any(point["served_here"] for point in QWEN.get("/eos/choices").json()["points"])


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
BUDGET = st.none() | st.integers(-2, 700) | st.floats(0, 1) | st.floats(0, 120).map(lambda v: f"{v}%") | ANY
NUMBER = st.integers(-1, 5000) | st.integers() | ANY
BODY = st.fixed_dictionaries(
    {"budgets": st.lists(BUDGET, max_size=9) | ANY},
    optional={
        "text_tokens": NUMBER,
        "output_tokens": NUMBER,
        "images": st.integers(0, 40) | NUMBER,
        "visual_tokens": NUMBER,
        "size": st.lists(st.integers(-1, 70000), min_size=2, max_size=2) | ANY,
    },
)
WISH = st.fixed_dictionaries(
    {},
    optional={
        "kv_gib": st.floats() | st.text(max_size=5),
        "concurrency": st.integers() | st.integers(1, 99),
        "accuracy_floor": st.floats(0, 1.1) | st.text(max_size=5),
        "prompt": st.integers(-1, 2**21),
        "output": st.integers(-1, 2**21),
        "images": st.integers(-1, 2000),
        "by": st.sampled_from(["low", "mean", "?"]),
        "profile": st.sampled_from(["all", "mmr", "mmr,random", ""]) | st.text(max_size=9),
    },
)


@settings(deadline=None, max_examples=150)
@given(body=BODY | ANY, which=st.integers(0, len(CLIENTS) - 1))
def test_no_body_breaks_a_plan(body: Any, which: int) -> None:
    answer = CLIENTS[which].post("/eos/plan", content=json.dumps(body).encode())
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert answer.json()["error"].isprintable()


@settings(deadline=None, max_examples=50)
@given(content=st.binary(max_size=200))
def test_no_bytes_break_a_plan(content: bytes) -> None:
    assert CLIENTS[0].post("/eos/plan", content=content).status_code == 400


@settings(deadline=None, max_examples=60)
@given(query=WISH)
def test_no_query_breaks_the_choices(query: dict[str, Any]) -> None:
    answer = CLIENTS[0].get("/eos/choices", params=query)
    assert answer.status_code in (200, 400)


def test_the_schema_names_what_can_be_sent_and_what_comes_back() -> None:
    schema = CLIENTS[0].get("/openapi.json").json()
    body = schema["paths"]["/eos/plan"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {*("budgets", "text_tokens", "output_tokens", "images", "visual_tokens", "size")}
    names = {p["name"] for p in schema["paths"]["/eos/choices"]["get"]["parameters"]}
    assert {"kv_gib", "concurrency", "accuracy_floor"} < names
