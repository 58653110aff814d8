"""Where tokens stand: the layout of a ragged batch, walked with a fixed choice and held against plain lists."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from unit_builders import Prompt, batches, make_profile

from eos_vllm.core.layout import BatchLayout, Entry, build_layout
from eos_vllm.core.plan import Planner

PLANNER = Planner(make_profile((0, 2, 3), (0.4, 0.3, 0.5), visual=8, tokens=2))
CPU = torch.device("cpu")

# A token is named by its row in the batch, its position there, and the image that it belongs to (None for text).
Token = tuple[int, int, int | None]


def tokens_of(r: int, prompt: Prompt) -> list[Token]:
    of: list[int | None] = [None] * (prompt.length + prompt.generated)
    for image, span in enumerate(prompt.spans):
        of[span.start : span.end] = [image] * span.length
    return [(r, position, image) for position, image in enumerate(of)]


def drop(tokens: list[Token], counts: dict[int, int]) -> list[Token]:
    """Keeps of each image its last tokens, as many as ``counts`` says."""
    keep = {i: [t for t in tokens if t[2] == i][-count:] for i, count in counts.items()}
    return [t for t in tokens if t[2] is None or t in keep[t[2]]]


def walk(prompts: list[Prompt], layout: BatchLayout, budget: int) -> None:
    """Applies each step of ``layout`` to named tokens and compares with lists that drop the same tokens."""
    rows = [tokens_of(r, p) for r, p in enumerate(prompts)]
    batch = [t for row in rows for t in row]
    images = [(r, i) for r, p in enumerate(prompts) for i in range(len(p.images))]
    for s, step in enumerate(layout.steps):
        count = PLANNER.counts(budget)[s]
        source = step.source.tolist()
        tokens_in = sum(t[2] is not None for t in batch)
        for group in step.groups:
            for b, n in enumerate(group.images.tolist()):
                first, target = int(group.first_visual[b]), int(group.first_kept[b])
                stood = batch[first : first + group.total]
                assert [t[0::2] for t in stood] == [images[n]] * group.total
                assert int(group.first_row[b]) == min(j for j, t in enumerate(batch) if t[0] == images[n][0])
                source[target : target + group.keep] = range(first + group.total - group.keep, first + group.total)
        rows = [drop(row, dict.fromkeys(range(8), count)) for row in rows]
        batch = [batch[i] for i in source]
        assert (step.tokens_in, step.tokens_kept) == (tokens_in, sum(t[2] is not None for t in batch))
        assert batch == [t for row in rows for t in row]
        assert [len(row) for row in rows] == layout.segment_lengths[s + 1].tolist()


@given(prompts=batches(longest_image=10), budget=st.integers(1, 7))
def test_every_step_keeps_all_text_and_the_planned_tokens_in_order(prompts: list[Prompt], budget: int) -> None:
    rows = [p.row(PLANNER, budget) for p in prompts]
    layout = build_layout(rows, 4, "relevant_text", CPU)
    assert layout.segment_lengths[0].tolist() == [row.num_tokens for row in rows]
    walk(prompts, layout, budget)


@given(prompts=batches(longest_image=10))
def test_text_rows_are_the_queries_of_each_image_in_the_unreduced_batch(prompts: list[Prompt]) -> None:
    rows = [p.row(PLANNER) for p in prompts]
    starts = [sum(row.num_tokens for row in rows[:r]) for r in range(len(rows))]
    layout = build_layout(rows, 4, "all_text", CPU)
    images = [(r, i) for r, p in enumerate(prompts) for i in range(len(p.images))]
    for (r, i), text, mask in zip(images, layout.text_rows.tolist(), layout.text_mask.tolist(), strict=True):
        plan = rows[r].plan
        assert plan is not None
        real = [row for row, is_real in zip(text, mask, strict=True) if is_real]
        assert real == [starts[r] + p for p in plan.query_positions(i)]
        assert mask == sorted(mask, reverse=True)
    lengths = {}
    for members, places in layout.visual_groups:
        for n, own in zip(members.tolist(), places.tolist(), strict=True):
            r, i = images[n]
            lengths[n] = len(own)
            first = starts[r] + prompts[r].spans[i].start
            assert own == list(range(first, first + prompts[r].images[i][0]))
    assert sorted(lengths) == list(range(len(images)))


@given(prompts=batches(longest_image=10))
def test_queries_stand_and_see_as_the_plan_says_in_every_segment(prompts: list[Prompt]) -> None:
    rows = [p.row(PLANNER) for p in prompts]
    layout = build_layout(rows, 4, "all_text", CPU)
    images = [(r, i) for r, p in enumerate(prompts) for i in range(len(p.images))]
    for s, step in enumerate(layout.steps):
        starts = [0, *layout.segment_lengths[s].cumsum().tolist()]
        for group in step.groups:
            for b, n in enumerate(group.images.tolist()):
                r, i = images[n]
                plan = rows[r].plan
                assert plan is not None
                queries = plan.query_positions(i)
                visible = [plan.segment_length(s, p + 1) for p in queries]
                assert group.visible[b, : len(queries)].tolist() == visible
                assert group.query_rows[b, : len(queries)].tolist() == [starts[r] + v - 1 for v in visible]
                # Padding sees one key: none would make its softmax no number.
                assert set(group.visible[b, len(queries) :].tolist()) <= {1}
                assert group.longest >= layout.segment_lengths[s][r]
                last = plan.last_token_is_visual and i == len(prompts[r].images) - 1
                assert bool(group.keeps_last is not None and group.keeps_last[b]) == last


def test_last_text_has_one_query_per_image() -> None:
    rows = [Prompt(2, ((8, 3), (8, 2))).row(PLANNER)]
    layout = build_layout(rows, 4, "last_text", CPU)
    assert layout.text_rows.tolist() == [[22], [22]]
    assert layout.steps[0].groups[0].query_rows.shape == (2, 1)
    assert build_layout(rows, 4, "all_text", CPU).text_rows.shape == (2, 5)


def test_images_with_equal_counts_share_one_group_across_requests_and_budgets() -> None:
    # Budgets 2 and 3: the same 8 tokens, other counts; the image of 2 tokens loses none and has no group.
    prompts = [Prompt(1, ((8, 2), (8, 1))), Prompt(0, ((8, 4),)), Prompt(3, ((2, 1),)), Prompt(2, ((8, 2),))]
    budgets = [2, 2, 2, 3]
    rows = [p.row(PLANNER, budget) for p, budget in zip(prompts, budgets, strict=True)]
    layout = build_layout([*rows, Entry(1)], 4, "all_text", CPU)
    last = {(g.total, g.keep): g.images.tolist() for g in layout.steps[2].groups}
    two, three = PLANNER.counts(2), PLANNER.counts(3)
    assert last == {(two[1], 2): [0, 1, 2], (three[1], 3): [4]}
    assert [places.shape[1] for _, places in layout.visual_groups] == [8, 2]


def test_a_step_that_reduces_nothing_passes_all_rows() -> None:
    layout = build_layout([Prompt(2, ((8, 3),)).row(PLANNER, budget=8), Entry(1)], 4, "all_text", CPU)
    for step in layout.steps:
        assert step.groups == ()
        assert step.source.tolist() == list(range(14))
