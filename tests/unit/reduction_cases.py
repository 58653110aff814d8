"""Requests with made-up values, the core's reducers on a batch of them, and a reference of plain loops.

The reference is written from the design's words. It knows nothing of layouts, plans or batches: it holds each request
as a list of tokens.
"""

from dataclasses import dataclass

import torch
from test_importance import naive_attention, naive_weights
from test_operator import naive as naive_operator
from unit_builders import Prompt, profile_data, reducer

from eos_vllm.core.layout import build_layout
from eos_vllm.core.plan import Planner
from eos_vllm.core.profile import Profile, parse_profile
from eos_vllm.core.reduction import image_query_weights, reduce_tokens

WIDTH, HEADS, GROUPS, HEAD, SCALE = 6, 4, 2, 4, 0.5
MODEL = {"architecture": "LlavaForConditionalGeneration", "num_decoder_layers": 8, "visual_tokens": 8}
RULES = ["relevant_text", "all_text", "last_text"]


def profile_of(rule: str, norm: str = "token") -> Profile:
    """Three reducers: a hybrid with all parameters, pruning, and reweighting alone."""
    hybrid = {"gamma": 0.4, "tau": 0.3, "theta": 0.1, "rho": 0.6, "nu": 0.5}
    reducers = [reducer(0, 0.4, **hybrid), reducer(2, 0.3), reducer(3, 0.5, rho=0.8)]
    importance, operator = {"queries": rule}, {"norm": norm}
    return parse_profile(profile_data(model=MODEL, reducers=reducers, importance=importance, operator=operator))


@dataclass
class Request:
    """A request with made-up values: embeddings, and for each reducer what its layer adds, asks and answers with."""

    prompt: Prompt
    budget: int
    embeddings: torch.Tensor
    added: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor


def make_request(prompt: Prompt, budget: int, seed: int) -> Request:
    g = torch.Generator().manual_seed(seed)
    tokens = prompt.length + prompt.generated
    return Request(
        prompt,
        budget,
        torch.randn(tokens, WIDTH, generator=g),
        torch.randn(3, tokens, WIDTH, generator=g),
        torch.randn(3, tokens, HEADS, HEAD, generator=g) * 2,
        torch.randn(3, tokens, GROUPS, HEAD, generator=g) * 2,
    )


Outcome = tuple[list[list[int]], torch.Tensor]


def run_batched(requests: list[Request], profile: Profile) -> list[Outcome]:
    """What the core does: for each request the positions left after each reducer, and the final hidden states."""
    planner = Planner(profile)
    rows = [r.prompt.row(planner, r.budget) for r in requests]
    layout = build_layout(rows, profile.num_segments, profile.importance.queries, torch.device("cpu"))
    hidden = torch.cat([r.embeddings for r in requests])
    weights = image_query_weights(profile.importance.queries, hidden, layout)
    position = torch.cat([torch.arange(row.num_tokens) for row in rows])
    image_text = layout.image_text
    owner = torch.cat([torch.full((row.num_tokens,), r) for r, row in enumerate(rows)])
    left: list[list[list[int]]] = [[] for _ in requests]
    for s, step in enumerate(layout.steps):
        added, query, key = (
            torch.stack([getattr(requests[r], name)[s, p] for r, p in zip(owner, position, strict=True)])
            for name in ("added", "query", "key")
        )
        params = profile.operator_params(s)
        hidden, source = reduce_tokens(hidden + added, query, key, step, weights, params, SCALE, image_text=image_text)
        position, owner = position[source], owner[source]
        image_text = None if image_text is None else image_text[source]
        for r in range(len(requests)):
            left[r].append(position[owner == r].tolist())
    return [(left[r], hidden[owner == r]) for r in range(len(requests))]


def run_reference(request: Request, profile: Profile) -> Outcome:
    """One request, from the words of the design: reduce each image on its own, keep all text."""
    prompt, rule = request.prompt, profile.importance.queries
    image_of = [None] * (prompt.length + prompt.generated)
    for i, span in enumerate(prompt.spans):
        image_of[span.start : span.end] = [i] * span.length  # type: ignore[list-item]
        for place in span.text:
            image_of[span.start + place] = -1  # type: ignore[call-overload]
    weights: list[dict[int, float]] = []
    for i, span in enumerate(prompt.spans):
        queries = [p for p in range(span.end, prompt.length) if image_of[p] is None] or [prompt.length - 1]
        own = [p for p in range(span.start, span.end) if image_of[p] == i]
        values = naive_weights(rule, request.embeddings[own], request.embeddings[queries])
        weights.append(dict(zip(queries, values, strict=True)))
        assert i == len(weights) - 1
    counts = Planner(profile).counts(request.budget)
    tokens = list(range(len(image_of)))
    hidden = {p: request.embeddings[p] for p in tokens}
    left = []
    for s, count in enumerate(counts):
        hidden = {p: hidden[p] + request.added[s, p] for p in tokens}
        key = request.key[s, tokens]
        gone: set[int] = set()
        changed: dict[int, torch.Tensor] = {}
        for i in range(len(prompt.images)):
            visual = [p for p in tokens if image_of[p] == i]
            if len(visual) <= count:
                continue
            scores = dict.fromkeys(visual, 0.0)
            for q, weight in weights[i].items():
                sees = torch.tensor([[tokens.index(q) + 1]])
                columns = torch.tensor([[tokens.index(p) for p in visual]])
                received = naive_attention(request.query[s, [q]][None], key[None], sees, [[weight]], columns, SCALE)[0]
                for p, value in zip(visual, received, strict=True):
                    scores[p] += value
            ranked = sorted(visual, key=lambda p: (p != prompt.length - 1, -scores[p], p))
            kept, lost = sorted(ranked[:count]), sorted(ranked[count:])
            anchors, discards = (torch.stack([hidden[p] for p in part]) for part in (kept, lost))
            out = naive_operator(anchors, discards, torch.tensor([scores[p] for p in lost]), profile.operator_params(s))
            changed |= dict(zip(kept, out.float(), strict=True))
            gone |= set(lost)
        hidden |= changed
        tokens = [p for p in tokens if p not in gone]
        left.append(tokens)
    return left, torch.stack([hidden[p] for p in tokens])
