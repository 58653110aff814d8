"""The relaxed forward: its value is the hard reference at the exported profile."""

from typing import Any

import pytest
import torch
from search_cases import LAYERS, VISUAL, make_example, make_row, make_rules, make_theta

from eos_search.export import searched_profile
from eos_search.reference import ReferenceModel
from eos_search.relaxed import RelaxedModel, RelaxedOutput
from eos_search.structure import read_structure
from eos_search.theta import Theta
from eos_vllm.core.profile import Profile

Small = tuple[Any, Any]


def reference_logits(small: Small, profile: Profile, example: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of the answer's tokens, decoded one by one from the reference's cache, and what it kept."""
    model = ReferenceModel(*small, profile)
    state = model.prefill(example.embeddings[: example.prompt_length], example.spans)
    hidden = [state.hidden[-1:]]
    for i, token in enumerate(example.targets[:-1].tolist()):
        hidden.append(model._decode(token, example.prompt_length + i, state.cache))
    with torch.no_grad():
        return small[0].lm_head(torch.cat(hidden)), state.kept


def relaxed(small: Small, theta: Theta, example: Any, rules: Any, align: tuple[int, ...] = ()) -> RelaxedOutput:
    values = theta()
    return RelaxedModel(small[0], rules).forward(example, values, read_structure(values, rules), align)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("queries", "norm", "images", "acting"),
    [
        ("relevant_text", "token", 1, {0: 0.5, 2: 0.5, 4: 0.6}),
        ("relevant_text", "token", 2, {1: 0.7, 3: 0.3}),
        ("all_text", "frobenius", 1, {2: 0.95}),
        ("last_text", "token", 1, {1: 0.5, 2: 0.5, 3: 0.5}),
        ("relevant_text", "token", 1, {0: 0.99, 3: 0.99}),
    ],
)
def test_the_value_is_the_reference_at_the_exported_profile(
    small: Small, queries: str, norm: str, images: int, acting: dict[int, float], grad: bool
) -> None:
    rules = make_rules(queries, norm)
    theta = make_theta(acting)
    example = make_example(small, make_row(3, images), rules)
    with torch.set_grad_enabled(grad):
        output = relaxed(small, theta, example, rules)
    logits, kept = reference_logits(small, searched_profile(theta, rules, "test", {}), example)
    assert len(output.kept) == len(kept) == len(acting)
    for mine, theirs in zip(output.kept, kept, strict=True):
        assert mine[mine < example.prompt_length].tolist() == theirs.tolist()
    assert output.logits.shape == (len(example.targets), logits.shape[1])
    torch.testing.assert_close(output.logits.detach(), logits, rtol=1e-4, atol=2e-4)
    assert output.logits.requires_grad == grad


def test_the_operator_changes_the_value(small: Small) -> None:
    """So that the comparison above could fail: without transfer the logits differ by far more than rounding."""
    rules = make_rules()
    example = make_example(small, make_row(3), rules)
    with torch.no_grad():
        some = relaxed(small, make_theta({1: 0.7}), example, rules).logits
        none = relaxed(small, make_theta({1: 0.7}, gamma=1e-6, rho=1e-6), example, rules).logits
    assert (some - none).abs().max().item() > 0.05


def test_closed_gates_are_the_identity(small: Small) -> None:
    rules, theta = make_rules(), make_theta({})
    row = make_row(1)
    example = make_example(small, row, rules)
    output = relaxed(small, theta, example, rules, align=range(LAYERS))  # type: ignore[arg-type]
    model, processor = small
    with torch.no_grad():
        whole = model(
            **processor(
                text=f"USER: <image>\n{row.question} ASSISTANT: yes", images=row.images.load(), return_tensors="pt"
            ),
            output_hidden_states=True,
        )
    torch.testing.assert_close(
        output.logits.detach(), whole.logits[0, example.prompt_length - 1 :], rtol=1e-4, atol=2e-4
    )
    unreduced = RelaxedModel(model, rules).reference(example, range(LAYERS))
    for layer in range(LAYERS - 1):
        expected = whole.hidden_states[layer + 1][0]
        torch.testing.assert_close(unreduced[layer], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.states[layer].hidden.detach(), expected, rtol=1e-4, atol=1e-4)
        assert output.states[layer].positions.tolist() == list(range(len(expected)))


def test_states_are_those_behind_the_reducer(small: Small) -> None:
    rules = make_rules()
    example = make_example(small, make_row(2), rules)
    output = relaxed(small, make_theta({2: 0.5}), example, rules, align=(1, 2, 3))
    sizes = {layer: len(state.hidden) for layer, state in output.states.items()}
    text = len(example.embeddings) - VISUAL
    assert sizes == {1: text + 36, 2: text + 19, 3: text + 19}
    assert output.states[3].positions.tolist() == output.kept[0].tolist()


def test_rows_of_an_image_that_is_too_small_to_reduce_pass(small: Small) -> None:
    """A minimum of all tokens: the gates are open, nothing goes, and nothing breaks."""
    rules = make_rules(minimum=VISUAL)
    example = make_example(small, make_row(2), rules)
    theta = make_theta({1: 0.5, 3: 0.5})
    output = relaxed(small, theta, example, rules)
    closed = relaxed(small, make_theta({}), example, rules)
    torch.testing.assert_close(output.logits, closed.logits, rtol=1e-4, atol=2e-4)
    assert [len(kept) for kept in output.kept] == [len(example.embeddings)] * 2
    output.logits.sum().backward()
