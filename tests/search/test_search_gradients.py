"""Gradients of the relaxed forward: where they are, and that they are the derivative where there is one."""

from typing import Any

import pytest
import torch
from search_cases import LAYERS, make_example, make_row, make_rules, make_theta

from eos_search.estimators.equation12 import keep_probability
from eos_search.examples import Prepared
from eos_search.objective import Objective, reference_rows, task_terms
from eos_search.relaxed import Relaxation, RelaxedModel
from eos_search.structure import Rules, read_structure
from eos_search.theta import KINDS, Theta, ThetaValues
from eos_vllm.core.layout import Entry, build_layout
from eos_vllm.core.plan import ImageSpan, RequestPlan

Small = tuple[Any, Any]
SMOOTH = [kind for kind in KINDS if kind not in ("gate", "discard")]
OBJECTIVE = Objective(6, 3, 36, (2, 3, 5), lambda_align=0.5)


def task_loss(
    model: Any,
    example: Prepared,
    values: ThetaValues,
    rules: Rules,
    alpha: float = 10.0,
    row: int = 0,
    **relaxation: Any,
) -> torch.Tensor:
    relaxed = RelaxedModel(model, rules, Relaxation(alpha, **relaxation))
    reference = reference_rows(OBJECTIVE, example, relaxed.reference(example, OBJECTIVE.aligned))
    output = relaxed.forward(example, values, read_structure(values, rules), OBJECTIVE.aligned, row)
    return task_terms(OBJECTIVE, example, output, reference).total


def gradient(model: Any, example: Prepared, theta: Theta, rules: Rules, **options: Any) -> dict[str, torch.Tensor]:
    """Gradient of the task loss to the mapped values, by kind ``[L]``."""
    table = theta().table.detach().requires_grad_()
    task_loss(model, example, ThetaValues(table), rules, **options).backward()
    assert table.grad is not None
    return dict(zip(KINDS, table.grad.unbind(dim=1), strict=True))


@pytest.mark.parametrize(
    ("acting", "alpha"),
    [({2: 0.6}, 10.0), ({1: 0.5, 3: 0.5}, 0.0), ({0: 0.4, 2: 0.5, 3: 0.5}, 0.0)],
)
def test_smooth_parameters_have_the_derivative_of_the_value(
    exact: tuple[Any, Prepared], acting: dict[int, float], alpha: float
) -> None:
    """Against central differences. With alpha 0 the choices of later reducers carry no gradient: a derivative of the
    value doesn't see them, for they move in jumps."""
    rules, theta = make_rules(), make_theta(acting)
    model, example = exact
    found = gradient(model, example, theta, rules, alpha=alpha)
    table = theta().table.detach()
    step = 1e-5
    for layer in acting:
        for kind in SMOOTH:
            values = []
            for sign in (1, -1):
                moved = table.clone()
                moved[layer, KINDS.index(kind)] += sign * step
                with torch.no_grad():
                    values.append(task_loss(model, example, ThetaValues(moved), rules).item())
            expected = (values[0] - values[1]) / (2 * step)
            assert expected != 0
            assert found[kind][layer].item() == pytest.approx(expected, rel=1e-4, abs=1e-9), (kind, layer)


def test_a_closed_gate_has_the_derivative_of_opening(exact: tuple[Any, Prepared]) -> None:
    """Against a forward pass written out here, in which a share of the reduction is applied."""
    rules, layer, step = make_rules(), 2, 1e-5
    theta = make_theta({})
    model, example = exact
    structure = read_structure(theta(), rules)
    found = gradient(model, example, theta, rules)
    # The hard reduction that the gate would open to: the same point with the gate at the threshold.
    opened = theta().table.detach()
    opened[layer, 0] = 0.5 + 1e-12
    values = ThetaValues(opened)
    hard = read_structure(values, rules)
    assert hard.counts == (structure.candidates[layer],)
    relaxed = RelaxedModel(model, rules)
    with torch.no_grad():
        state = relaxed.forward(example, values, hard, (layer,)).states[layer]
        reference = reference_rows(OBJECTIVE, example, relaxed.reference(example, OBJECTIVE.aligned))
        unreduced = relaxed.reference(example, (layer,))[layer]
    full = torch.zeros_like(unreduced).index_copy_(0, state.positions, state.hidden - unreduced[state.positions])
    gone = torch.ones(len(unreduced), dtype=torch.float64).index_fill_(0, state.positions, 0.0)

    def loss(share: float) -> float:
        decoder, hidden = model.model.language_model, example.embeddings
        positions = torch.arange(len(hidden))
        rotary = decoder.rotary_emb(hidden[None], positions[None])
        mask = torch.full((len(hidden), len(hidden)), -torch.inf, dtype=torch.float64).triu(1)
        states = {}
        for index, block in enumerate(decoder.layers):
            seen = mask + (torch.log1p(-share * gone) if index > layer else 0.0)
            hidden = block(hidden[None], position_embeddings=rotary, attention_mask=seen[None, None])[0]
            if index == layer:
                hidden = hidden + share * full
            states[index] = hidden
        answer = model.lm_head(decoder.norm(hidden[-len(example.targets) :]))
        aligned = [
            (states[index][example.is_text] - reference[index]).square().mean() for index in OBJECTIVE.align_layers
        ]
        entropy = torch.nn.functional.cross_entropy(answer, example.targets)
        return (entropy + OBJECTIVE.lambda_align * sum(aligned) / len(aligned)).item()

    with torch.no_grad():
        expected = (loss(step) - loss(-step)) / (2 * step)
    assert found["gate"][layer].item() == pytest.approx(expected, rel=1e-4)


def test_every_kind_gets_a_gradient_where_it_works(small: Small) -> None:
    rules, theta = make_rules(), make_theta({1: 0.5, 3: 0.5})
    found = gradient(small[0], make_example(small, make_row(6), rules), theta, rules)
    for kind in KINDS:
        assert found[kind].isfinite().all()
        assert (found[kind][[1, 3]] != 0).all(), kind
        closed = found[kind][[0, 2, 4]]
        assert (closed == 0).all() if kind == "discard" else (closed != 0).all(), kind
        assert found[kind][LAYERS - 1] == 0


def test_closed_layers_leave_other_gradients_alone(small: Small) -> None:
    rules, theta = make_rules(), make_theta({1: 0.5, 3: 0.5})
    example = make_example(small, make_row(6), rules)
    found = gradient(small[0], example, theta, rules)
    without = gradient(small[0], example, theta, rules, explore=False)
    for kind in KINDS:
        torch.testing.assert_close(found[kind][[1, 3]], without[kind][[1, 3]], rtol=1e-4, atol=1e-7)
        assert (without[kind][[0, 2, 4]] == 0).all()


def test_checkpointing_changes_no_gradient(exact: tuple[Any, Prepared]) -> None:
    """But for last bits: then a reducer's queries and keys are computed apart from the layer's."""
    rules, theta = make_rules(), make_theta({1: 0.5, 3: 0.5})
    model, example = exact
    found = gradient(model, example, theta, rules)
    again = gradient(model, example, theta, rules, checkpointing=True)
    for kind in KINDS:
        torch.testing.assert_close(found[kind], again[kind], rtol=1e-9, atol=1e-12)


def test_weights_stay_frozen(small: Small) -> None:
    rules = make_rules()
    gradient(small[0], make_example(small, make_row(6), rules), make_theta({1: 0.5}), rules)
    assert all(weight.grad is None and not weight.requires_grad for weight in small[0].parameters())


def test_keep_probabilities_are_equation_12() -> None:
    spans = (ImageSpan(1, 5),)
    plan = RequestPlan(8, spans, ((5, 2),))
    step = build_layout([Entry(8, plan)], 2, "all_text", torch.device("cpu")).steps[0]
    scores = torch.tensor([[0.1, 0.5, 0.2, 0.4, 0.3]], requires_grad=True)
    gate = torch.tensor(0.8, requires_grad=True)
    discard = torch.tensor(0.6, requires_grad=True)
    keep = keep_probability(step, [scores], gate * discard, 3.0, 8)
    expected = torch.sigmoid(3.0 / 0.3 * (scores.detach()[0] - 0.4))
    torch.testing.assert_close(keep.detach(), torch.cat([torch.zeros(1), expected, torch.zeros(2)]))
    keep.sum().backward()
    left = 1 - 0.8 * 0.6
    assert gate.grad is not None
    assert discard.grad is not None
    assert scores.grad is not None
    assert gate.grad.item() == pytest.approx(-0.6 / left * expected.sum().item(), rel=1e-5)
    assert discard.grad.item() == pytest.approx(-0.8 / left * expected.sum().item(), rel=1e-5)
    torch.testing.assert_close(scores.grad[0], 10.0 * expected * (1 - expected))


def test_scores_of_zero_break_nothing() -> None:
    step = build_layout(
        [Entry(8, RequestPlan(8, (ImageSpan(1, 5),), ((5, 2),)))], 2, "all_text", torch.device("cpu")
    ).steps[0]
    keep = keep_probability(step, [torch.zeros(1, 5)], torch.tensor(0.5), 10.0, 8)
    assert keep.isfinite().all()


@pytest.mark.parametrize("tries", [1, 2])
def test_gates_in_turn_have_the_gradients_of_all_of_them(exact: tuple[Any, Prepared], tries: int) -> None:
    """As a mean over as many rows as there are closed gates; open ones have theirs in every row."""
    rules, theta = make_rules(), make_theta({1: 0.5, 3: 0.5})
    model, example = exact
    every = gradient(model, example, theta, rules)
    closed = sorted(read_structure(theta(), rules).candidates)
    rows = []
    for row in range(len(closed)):
        table = theta().table.detach().requires_grad_()
        task_loss(model, example, ThetaValues(table), rules, row=row, tries=tries).backward()
        assert table.grad is not None
        moved = [layer for layer in closed if table.grad[layer].abs().max() > 0]
        assert len(moved) == tries
        rows.append(table.grad)
    mean = dict(zip(KINDS, torch.stack(rows).mean(dim=0).unbind(dim=1), strict=True))
    for kind in KINDS:
        torch.testing.assert_close(mean[kind], every[kind], rtol=1e-6, atol=1e-12)


def test_a_layer_gives_its_scores_the_queries_that_it_works_with(exact: tuple[Any, Prepared]) -> None:
    """Its projections run once, whether its reducer acts, might, or neither."""
    rules, theta = make_rules(), make_theta({1: 0.5, 3: 0.5})
    model, example = exact
    calls: list[int] = []
    layers = model.model.language_model.layers
    for number, layer in enumerate(layers):
        layer.self_attn.q_proj.register_forward_hook(lambda *_, n=number: calls.append(n))
    relaxed = RelaxedModel(model, rules)
    relaxed.forward(example, theta(), read_structure(theta(), rules))
    assert calls == list(range(len(layers)))
