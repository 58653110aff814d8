"""One reducer at work on the tokens of a ragged batch: score, select, apply the operator, close the gaps.

Search, Hugging Face reference and vLLM call these two functions; all else around them is plumbing of the host.
"""

from collections.abc import Callable

import torch

from eos_vllm.core.importance import MEAN, ScoreOptions, complement, query_weights, received_attention, top_k
from eos_vllm.core.layout import BatchLayout, ImageGroup, ReducerStep
from eos_vllm.core.operator import OperatorParams, unified_operator
from eos_vllm.core.profile import QueryRule

# Logits, keys or embeddings held at once while scoring (128 MiB in float32); more go in parts, by images or queries.
_SCORE_ELEMENTS = 1 << 25

ScoreReduce = Callable[[torch.Tensor], torch.Tensor]
# Is told of a group: its rows in the batch, scores and choice, [B, N], [B, N] and [B, K], visual tokens only.
Observer = Callable[[ImageGroup, torch.Tensor, torch.Tensor, torch.Tensor], None]


def image_query_weights(rule: QueryRule, embeddings: torch.Tensor, layout: BatchLayout) -> torch.Tensor | None:
    """Query weights of every image of a batch, from the embeddings that enter decoder layer 0.

    Args:
        rule: query rule.
        embeddings: ``[tokens, d]``, in batch order.
        layout: the batch.

    Returns:
        ``[images, T]`` float32, rows summing to 1; None for rule ``image``, whose queries all count alike.
    """
    if rule == "image":
        return None
    if rule != "relevant_text":
        nothing = embeddings.new_empty((*layout.text_mask.shape, 0))
        return query_weights(rule, nothing, nothing, layout.text_mask)
    weights = torch.zeros(layout.text_mask.shape, device=embeddings.device)
    for images, rows in layout.visual_groups:
        per_image = (rows.shape[1] + layout.text_rows.shape[1]) * embeddings.shape[1]
        part = max(1, _SCORE_ELEMENTS // per_image)
        for some, own in zip(images.split(part), rows.split(part), strict=True):
            text = embeddings[layout.text_rows[some]]
            weights[some] = query_weights(rule, embeddings[own], text, layout.text_mask[some])
    return weights


def reduce_tokens(
    hidden: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    step: ReducerStep,
    weights: torch.Tensor | None,
    params: OperatorParams,
    scale: float,
    options: ScoreOptions = MEAN,
    positions: torch.Tensor | None = None,
    replace: ScoreReduce | None = None,
    image_text: torch.Tensor | None = None,
    observe: Observer | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies one reducer to the output of its decoder layer.

    Args:
        hidden: output of the layer ``[tokens, d]`` (residual added).
        query: the layer's own rotated queries ``[tokens, H, D]``.
        key: its rotated keys ``[tokens, Hk, D]``, followed by those of earlier steps that ``step.cached`` names.
        step: the layout of this reducer.
        weights: result of :func:`image_query_weights`.
        params: operator parameters of this reducer.
        scale: factor on attention logits.
        options: how attention becomes a score.
        positions: unreduced positions of the tokens ``[tokens]``, where ``options.debias`` needs them.
        replace: gives the scores to use, from those of a group of images ``[B, N]``; for baselines.
        image_text: which tokens are text within an image ``[tokens]`` bool (:attr:`BatchLayout.image_text`).
        observe: called for each group that is chosen from, before anything is changed.

    Returns:
        Tokens that go on ``[fewer tokens, d]`` in the same order, and the row that each came from ``[fewer tokens]``.
    """
    source = step.source.clone()
    anchors = []
    for group in step.groups:
        first, places = group.first_visual.unsqueeze(1), torch.arange(group.total, device=hidden.device)
        target = group.first_kept.unsqueeze(1) + places[: group.keep]
        visual = stays = None
        if group.text:
            assert image_text is not None
            # False sorts first, and order is kept: visual tokens in front, then the text.
            order = image_text[first + places].sort(dim=-1, stable=True).indices
            visual, stays = order[:, : -group.text], order[:, -group.text :]
        if group.keep == group.text:  # withdrawn: nothing to choose
            if stays is not None:
                source[target] = first + stays
            continue
        scores = _group_scores(query, key, group, weights, scale, options)
        if options.debias is not None:
            assert positions is not None
            scores = scores / options.debias[positions[first + places] - group.start.unsqueeze(1)]
        if visual is not None:
            scores = scores.gather(1, visual)
        if replace is not None:
            scores = replace(scores)
        selectable = scores
        if group.keeps_last is not None:
            selectable = scores.clone()
            selectable[:, -1].masked_fill_(group.keeps_last.bool(), torch.inf)
        chosen = top_k(selectable, group.keep - group.text)
        if observe is not None:
            observe(group, first + (places if visual is None else visual), scores, chosen)
        kept = chosen if visual is None else visual.gather(1, chosen)
        anchored = target
        if stays is not None:
            together = torch.cat([kept, stays], dim=1).sort(dim=1).values
            source[target] = first + together
            anchored = group.first_kept.unsqueeze(1) + torch.searchsorted(together, kept)
        else:
            source[target] = first + kept
        if not params.is_identity:
            gone = complement(chosen, scores.shape[1])
            dropped = gone if visual is None else visual.gather(1, gone)
            tokens = unified_operator(hidden[first + kept], hidden[first + dropped], scores.gather(1, gone), params)
            anchors.append((anchored, tokens))
    out = hidden.index_select(0, source)
    for target, tokens in anchors:
        out[target] = tokens
    return out, source


def _group_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    group: ImageGroup,
    weights: torch.Tensor | None,
    scale: float,
    options: ScoreOptions,
) -> torch.Tensor:
    images, queries = group.query_rows.shape
    per_query = query.shape[1] * group.longest
    # Of keys, each image gathers its own request's.
    part = max(1, _SCORE_ELEMENTS // max(per_query * queries, group.longest * key.shape[1] * key.shape[2]))
    width = min(queries, max(1, _SCORE_ELEMENTS // per_query))
    scored = []
    for image in range(0, images, part):
        parts = [
            _score(query, key, group, weights, scale, options, image, image + part, first, first + width)
            for first in range(0, queries, width)
        ]
        together = torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)
        scored.append(together.sum(dim=0) if options.reduce == "mean" else together.amax(dim=0))
    scores = torch.cat(scored)
    return options.join(scores) if options.reduce == "mean" and options.join is not None else scores


def _score(
    query: torch.Tensor,
    key: torch.Tensor,
    group: ImageGroup,
    weights: torch.Tensor | None,
    scale: float,
    options: ScoreOptions,
    low: int,
    high: int,
    first_query: int,
    last_query: int,
) -> torch.Tensor:
    """What some queries of some images of a group add to the scores ``[images, N]``."""
    first_row = group.first_row[low:high].unsqueeze(1)
    places = torch.arange(group.longest, device=key.device)
    key_rows = first_row + places
    if group.cached is not None and group.first_cached is not None:
        earlier = group.first_cached[low:high].unsqueeze(1) + places
        key_rows = torch.where(places < group.cached[low:high].unsqueeze(1), earlier, key_rows)
    # Rows past a shorter request are never visible to its queries; the clamp only keeps the index in range.
    key_rows = key_rows.clamp_(max=key.shape[0] - 1)
    columns = group.first_visual[low:high].unsqueeze(1) - first_row + torch.arange(group.total, device=key.device)
    rows = group.query_rows[low:high, first_query:last_query]
    if weights is None:
        shares = torch.full(rows.shape, 1.0 / group.query_rows.shape[1], device=key.device)
    else:
        shares = weights[group.images[low:high], first_query:last_query]
    return received_attention(
        query[rows],
        key[key_rows],
        group.visible[low:high, first_query:last_query],
        shares,
        columns,
        scale,
        options,
    )
