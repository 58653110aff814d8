"""An example as a selector before the decoder leaves it: K tokens of each image, at contiguous positions."""

from dataclasses import replace

import torch

from eos_search.examples import Prepared, query_weights
from eos_vllm.core.operator import OperatorParams
from eos_vllm.core.plan import ImageSpan
from eos_vllm.core.preselection import preselect
from eos_vllm.core.profile import QueryRule
from eos_vllm.core.selectors import Selector


def entering(example: Prepared, selector: Selector, params: OperatorParams, keep: int, rule: QueryRule) -> Prepared:
    """What enters layer 0 behind the selector and its operator, whose parameters get gradients from it.

    Args:
        example: unreduced, with what the vision tower gave.
        selector: chooses the anchors.
        params: of the operator.
        keep: K; all where an image has no more.
        rule: query rule of reducers inside the decoder.
    """
    tokens = [preselect(seen, selector, params, keep)[0] for seen in example.towers]
    stays = torch.ones_like(example.is_text)
    spans, gone = [], 0
    for span, kept in zip(example.spans, tokens, strict=True):
        stays[span.start + len(kept) : span.end] = False
        spans.append(ImageSpan(span.start - gone, len(kept)))
        gone += span.length - len(kept)
    is_text = example.is_text[stays]
    embeddings = example.embeddings[stays]
    embeddings[~is_text] = torch.cat(tokens).to(embeddings.dtype)
    length = example.prompt_length - gone
    with torch.no_grad():
        weights = query_weights(rule, embeddings, length, spans)
    return replace(
        example,
        embeddings=embeddings,
        spans=tuple(spans),
        prompt_length=length,
        weights=weights,
        is_text=is_text,
        towers=(),
    )
