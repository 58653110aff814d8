"""Several questions about one image in one forward pass of the reference: fewer and larger operations.

They share all tokens up to the end of the image, and how many of its tokens go; their text is padded behind its end,
where causal attention does not look. All else is :class:`eos_search.reference.ReferenceModel`, one question at a time,
which tests hold this against.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from eos_search.reference import ReferenceModel, SharedPrefix, rotated_queries_and_keys
from eos_vllm.core.budget import RetainBudget
from eos_vllm.core.importance import ScoreOptions
from eos_vllm.core.layout import Entry, build_layout
from eos_vllm.core.plan import ImageSpan, RequestPlan
from eos_vllm.core.reduction import image_query_weights, reduce_tokens


@dataclass
class _Batch:
    """Q prompts behind all layers.

    Attributes:
        hidden: normed hidden state of each prompt's last token ``[Q, d]``.
        cache: keys and values, padded on the right.
        lengths: by layer, tokens left of each prompt ``[Q]``, and the longest of them with its padding.
    """

    hidden: torch.Tensor
    cache: DynamicCache
    lengths: list[tuple[torch.Tensor, int]]


@torch.no_grad()
def answer_together(
    reference: ReferenceModel,
    asked: Sequence[tuple[torch.Tensor, Sequence[int]]],
    span: ImageSpan,
    shared: SharedPrefix,
    budget: RetainBudget | None,
    max_tokens: int,
    stop: int | None,
) -> list[list[int]]:
    """Token ids of greedy answers.

    Args:
        reference: the model, and perhaps a profile.
        asked: for each question, embeddings ``[tokens, d]`` and token ids of its whole prompt.
        span: of the image, behind whose end they differ.
        shared: :meth:`~eos_search.reference.ReferenceModel.share` of what stands before.
        budget: retain budget of all of them.
        max_tokens: longest answer.
        stop: token id that ends an answer.
    """
    batch = _prefill(reference, asked, span, shared, budget)
    decoder, tokens = reference.decoder, [len(embeddings) for embeddings, _ in asked]
    positions = torch.tensor(tokens, device=batch.hidden.device)
    answers: list[list[int]] = [[] for _ in asked]
    going = set(range(len(asked)))
    hidden = batch.hidden
    for step in range(max_tokens):
        chosen = reference.model.lm_head(hidden).float().argmax(dim=-1)
        for n, token in enumerate(chosen.tolist()):
            if n in going:
                answers[n].append(token)
                if token == stop:
                    going.remove(n)
        if not going or step + 1 == max_tokens:
            break
        state = reference.model.get_input_embeddings()(chosen)[:, None]
        rotary = decoder.rotary_emb(state, (positions + step)[:, None])
        masks: dict[int, torch.Tensor] = {}
        for layer, (lengths, longest) in zip(decoder.layers, batch.lengths, strict=True):
            if longest not in masks:
                place = torch.arange(longest + step + 1, device=state.device)
                masks[longest] = ((place < lengths[:, None]) | (place >= longest))[:, None, None]
            state = layer(
                state,
                attention_mask=masks[longest],
                position_embeddings=rotary,
                past_key_values=batch.cache,
                use_cache=True,
            )
        hidden = decoder.norm(state)[:, 0]
    return answers


def _prefill(
    reference: ReferenceModel,
    asked: Sequence[tuple[torch.Tensor, Sequence[int]]],
    span: ImageSpan,
    shared: SharedPrefix,
    budget: RetainBudget | None,
) -> _Batch:
    planner, decoder = reference.planner, reference.decoder
    plans = [
        RequestPlan(len(embeddings), (), ()) if planner is None else planner.plan(ids, [span], budget)
        for embeddings, ids in asked
    ]
    together = torch.cat([embeddings for embeddings, _ in asked])
    device = together.device
    lengths = torch.tensor([len(embeddings) for embeddings, _ in asked], device=device)
    positions = torch.cat([torch.arange(len(embeddings), device=device) for embeddings, _ in asked])
    layout = None
    if planner is not None and plans[0].reduces:
        profile = planner.profile
        rule = profile.importance.queries
        entries = [Entry(len(embeddings), plan) for (embeddings, _), plan in zip(asked, plans, strict=True)]
        layout = build_layout(entries, profile.num_segments, rule, device)
        weights = image_query_weights(rule, together, layout)
        heads = reference.model.config.text_config.num_attention_heads
        options = ScoreOptions.of(profile.importance, heads, device)
    cache, by_layer = DynamicCache(config=decoder.config), []
    rows, longest = _rows(lengths)
    for index, layer in enumerate(decoder.layers):
        hidden, places = _padded(together, rows, lengths, longest), _padded(positions, rows, lengths, longest)
        rotary = decoder.rotary_emb(hidden, places)
        if index < len(shared.outputs):
            out = _behind(shared, index, layer, hidden, rotary, cache)
        else:
            out = layer(hidden, position_embeddings=rotary, past_key_values=cache, use_cache=True)
        by_layer.append((lengths, longest))
        left = out.flatten(0, 1)[rows]
        if layout is None or planner is None or index not in planner.profile.layers:
            together = left
            continue
        number = planner.profile.layers.index(index)
        flat = decoder.rotary_emb(together[None], positions[None])
        query, key = rotated_queries_and_keys(layer, together, flat)
        params, scale = planner.profile.operator_params(number), layer.self_attn.scaling
        together, source = reduce_tokens(
            left, query, key, layout.steps[number], weights, params, scale, options, positions
        )
        positions = positions[source]
        lengths = torch.as_tensor(layout.segment_lengths[number + 1], device=device)
        rows, longest = _rows(lengths)
    return _Batch(decoder.norm(together[lengths.cumsum(0) - 1]), cache, by_layer)


def _rows(lengths: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Places of all real tokens in a padded batch, flattened ``[tokens]``, and the length of its rows."""
    longest = int(lengths.max())
    place = torch.arange(longest, device=lengths.device)
    return (place < lengths[:, None]).flatten().nonzero()[:, 0], longest


def _padded(tokens: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor, longest: int) -> torch.Tensor:
    """Tokens ``[tokens, ...]`` as a batch ``[Q, longest, ...]``, 0 behind the end of each prompt."""
    padded = tokens.new_zeros((len(lengths) * longest, *tokens.shape[1:]))
    padded[rows] = tokens
    return padded.unflatten(0, (len(lengths), longest))


def _behind(
    shared: SharedPrefix,
    index: int,
    layer: torch.nn.Module,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    cache: DynamicCache,
) -> torch.Tensor:
    """Output of a layer for whole prompts ``[Q, tokens, d]``, of which the prefix is known."""
    known: Any = shared.cache.layers[index]
    questions, tokens = hidden.shape[:2]
    cache.update(known.keys.expand(questions, -1, -1, -1), known.values.expand(questions, -1, -1, -1), index)
    place = torch.arange(tokens, device=hidden.device)
    seen = place <= place[shared.tokens :, None]
    out = layer(
        hidden[:, shared.tokens :],
        attention_mask=seen[None, None],
        position_embeddings=(rotary[0][:, shared.tokens :], rotary[1][:, shared.tokens :]),
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([shared.outputs[index].expand(questions, -1, -1), out], dim=1)
