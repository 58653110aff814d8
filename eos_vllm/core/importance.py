"""Importance of visual tokens: the attention that they receive from chosen query tokens.

The query choice is a weight vector, not an index list, so that nothing on the device has to be read back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from eos_vllm.core.errors import ProfileError

if TYPE_CHECKING:  # profiles know selectors, and these rank by :func:`top_k`
    from eos_vllm.core.profile import ImportanceSpec, QueryRule


def query_weights(rule: "QueryRule", visual: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
    """Weight of each text token as a query; every row sums to 1.

    ``relevant_text`` is SparseVLM's rater rule on the embeddings that enter decoder layer 0: each visual token spreads
    one unit over the text by softmax of dot products; text whose mean share is above average counts, equally. Where
    none is above average all of it counts.

    Args:
        rule: which text counts.
        visual: visual embeddings, ``[B, N, d]``.
        text: embeddings of the text behind each image, padded, ``[B, T, d]``.
        text_mask: which of them are real, ``[B, T]`` bool, at least one per row, padding at the end.

    Returns:
        Weights ``[B, T]``, float32, 0 at padding.
    """
    if rule == "last_text":
        chosen = text_mask & (text_mask.cumsum(dim=1) == text_mask.sum(dim=1, keepdim=True))
    elif rule == "all_text":
        chosen = text_mask
    else:
        logits = visual.float() @ text.float().mT
        share = logits.masked_fill(~text_mask.unsqueeze(1), -torch.inf).softmax(dim=-1).mean(dim=1)
        mean = share.sum(dim=1, keepdim=True) / text_mask.sum(dim=1, keepdim=True)
        above = text_mask & (share > mean)
        chosen = torch.where(above.any(dim=1, keepdim=True), above, text_mask)
    weights = chosen.float()
    return weights / weights.sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class ScoreOptions:
    """How attention becomes a score.

    Attributes:
        reduce: joins queries: weighted mean, or the largest of those that count.
        heads: weight of each of this rank's heads ``[H]``, of mean 1 over all ranks; None where all count alike.
        debias: what each place of an image receives on average ``[N]``; scores are divided by it. None: nothing.
        join: means over tensor-parallel ranks, each of which holds some heads.
    """

    reduce: Literal["mean", "max"] = "mean"
    heads: torch.Tensor | None = None
    debias: torch.Tensor | None = None
    join: Callable[[torch.Tensor], torch.Tensor] | None = None

    @classmethod
    def of(
        cls,
        spec: "ImportanceSpec",
        heads: int,
        device: torch.device,
        rank: int = 0,
        join: Callable[[torch.Tensor], torch.Tensor] | None = None,
        ranks: int = 1,
    ) -> "ScoreOptions":
        """Those of a profile, on ``device``, for the ``rank``-th of ``ranks`` shares of ``heads`` heads in all.

        Raises:
            ProfileError: it names a head that the model lacks.
        """
        weights = None
        if spec.heads != "mean":
            if max(spec.heads) >= heads:
                problem = f"the model has {heads} attention heads"
                raise ProfileError("profile.importance.heads", list(spec.heads), problem, f"name heads below {heads}")
            chosen = torch.zeros(heads)
            chosen[list(spec.heads)] = heads / len(spec.heads)
            weights = chosen.chunk(ranks)[rank].to(device)
        debias = None if spec.debias is None else torch.tensor(spec.debias, device=device)
        return cls(spec.reduce, weights, debias, join)


MEAN = ScoreOptions()


def received_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    visible: torch.Tensor,
    weights: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    options: ScoreOptions = MEAN,
) -> torch.Tensor:
    """Attention that visual tokens receive: softmax over visible keys, mean over heads, then queries joined.

    Args:
        query: rotated queries ``[B, T, H, D]``.
        key: rotated keys ``[B, L, Hk, D]``; ``Hk`` divides ``H`` (grouped-query attention).
        visible: how many leading keys each query may see, ``[B, T]``.
        weights: weight of each query, ``[B, T]``; 0 where it does not count.
        columns: indices of the visual tokens among the keys, ``[B, N]``.
        scale: factor on the logits, ``1 / sqrt(D)``.
        options: how heads and queries are joined.

    Returns:
        Scores ``[B, N]``, float32. Under tensor parallel those of ``reduce="mean"`` are of the rank's own heads.
    """
    batch, _, heads, _ = query.shape
    groups = key.shape[2]
    q = query.float().unflatten(2, (groups, heads // groups)).permute(0, 2, 3, 1, 4)
    k = key.float().permute(0, 2, 3, 1).unsqueeze(2)
    logits = (q @ k) * scale
    hidden = torch.arange(key.shape[1], device=key.device) >= visible.unsqueeze(-1)
    attention = logits.masked_fill_(hidden.view(batch, 1, 1, *hidden.shape[1:]), -torch.inf).softmax(dim=-1)
    if options.heads is not None:
        attention = attention * options.heads.view(1, groups, heads // groups, 1, 1)
    if options.reduce == "mean":
        return (torch.einsum("bghtl,bt->bl", attention, weights) / heads).gather(1, columns)
    by_query = attention.mean(dim=(1, 2))
    by_query = by_query if options.join is None else options.join(by_query)
    return (by_query * (weights > 0).unsqueeze(-1)).amax(dim=1).gather(1, columns)


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the ``k`` highest scores in ascending order; equal scores go by lower index, on every device.

    Args:
        scores: ``[B, N]``.
        k: at least 1, at most N.

    Returns:
        ``[B, k]`` int64.
    """
    ranked = scores.sort(dim=-1, descending=True, stable=True).indices
    return ranked[..., :k].sort(dim=-1).values


def complement(kept: torch.Tensor, total: int) -> torch.Tensor:
    """Indices in ``0..total-1`` that are not among ``kept``, ascending, without reading anything back.

    Args:
        kept: distinct indices ``[B, K]``.
        total: N.

    Returns:
        ``[B, N - K]`` int64.
    """
    is_kept = torch.zeros(kept.shape[0], total, dtype=torch.int8, device=kept.device).scatter_(1, kept, 1)
    return is_kept.sort(dim=-1, stable=True).indices[:, : total - kept.shape[1]]
