"""A reference that reduces any family in Hugging Face's own model, one request at a time.

It shares nothing with the plugin: eager attention weights are caught as the model computes them, choices and operator
are those of :mod:`support.families.plain`, and how many tokens stay is told to it. What a profile means it reads from
the profile's own JSON.

Positions: a token keeps the position that the whole prompt gives it, and the answer goes on where it would behind the
whole prompt; M-RoPE's three rows alike. With one row of positions a reducer before the decoder makes another prompt,
in which what is left of an image stands as so many words would.

Newline rows within an image's span (LLaVA-NeXT, OneVision) are text: never dropped, and they ask nothing. Where a
reducer stands before the decoder they are visual tokens like the others, to that one and to all behind it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from support.families import plain
from support.families.prompts import HfModel, Prompt, Tokens

# Places among an image's visual tokens, ascending, and the scores of all of them ``[N]``, for a count.
Choice = tuple[list[int], Tensor]


@dataclass(frozen=True)
class Answer:
    """What the reference says of a request.

    Attributes:
        token_ids: greedy.
        first_logprobs: of the first of them ``[vocabulary]``.
        kept: by reducer, then image: rows of the image (as the tower gives them) that are left as visual tokens.
        lengths: by layer, tokens of the prompt whose keys and values it holds.
    """

    token_ids: list[int]
    first_logprobs: Tensor
    kept: list[list[list[int]]]
    lengths: list[int]


class Reference:
    """A family's model, and perhaps a profile."""

    def __init__(self, hf: HfModel, profile: Mapping[str, Any] | None = None, marker: Sequence[int] = ()) -> None:
        """Takes a loaded model.

        Args:
            hf: the model.
            profile: content of an ``eos-profile`` file, with ``operator`` and ``importance`` in full.
            marker: tokens of the chat template's generation prompt; windows of kind ``turn`` end behind them.
        """
        self.model, self.decoder = hf.model, hf.decoder
        self.profile, self.marker = profile or {}, list(marker)

    @torch.no_grad()
    def generate(self, prompt: Prompt, counts: Sequence[Sequence[int]], max_tokens: int) -> Answer:
        """Answers greedily.

        Args:
            prompt: from :meth:`HfModel.embed`.
            counts: for each image the visual tokens left by each reducer of the profile, in its order.
            max_tokens: answers are as long.
        """
        tokens, spans, position = prompt.tokens.copy(), list(prompt.spans), prompt.next_position
        images = len(spans)
        reducers = list(self.profile.get("reducers", ())) if images else []
        wanted = [[of[r] for of in counts] for r in range(len(reducers))]
        kept: list[list[list[int]]] = []
        if reducers and reducers[0]["layer"] == -1:
            position = self._reduce_before(tokens, spans, reducers[0], wanted[0], position)
            kept.append(tokens.rows(images))
        else:
            for i, rows in enumerate(prompt.newlines):
                tokens.image[(tokens.image == i) & torch.isin(tokens.row, torch.tensor(rows))] = -1
        queries = self._queries(tokens, spans) if reducers else []
        after = {reducer["layer"]: r for r, reducer in enumerate(reducers)}
        cache, lengths = DynamicCache(), []
        for index, layer in enumerate(self.decoder.layers):
            lengths.append(len(tokens.ids))
            with caught_attention(layer) as seen:
                tokens.hidden = self._layer(layer, tokens.hidden, tokens.positions, cache)
            if index < len(tokens.added):
                tokens.hidden = tokens.hidden + tokens.added[index]
            if index in after:
                self._reduce(tokens, seen[0], queries, reducers[after[index]], wanted[after[index]])
                kept.append(tokens.rows(images))
        rows = tokens.positions.shape[:-1]
        answer, first = self._answer(tokens.hidden[-1:], cache, rows, position, max_tokens)
        return Answer(answer, first, kept, lengths)

    def _answer(
        self, hidden: Tensor, cache: DynamicCache, rows: Sequence[int], position: int, max_tokens: int
    ) -> tuple[list[int], Tensor]:
        """Greedy tokens behind the prompt's last hidden state ``[1, d]``; log-probabilities of the first."""
        answer, first = [], torch.empty(0)
        for step in range(max_tokens):
            logits = self.model.lm_head(self.decoder.norm(hidden))[0]
            first = first if answer else logits.log_softmax(dim=-1)
            answer.append(int(logits.argmax()))
            if step + 1 < max_tokens:
                hidden = self.model.get_input_embeddings()(torch.tensor(answer[-1:]))
                for layer in self.decoder.layers:
                    hidden = self._layer(layer, hidden, torch.full((*rows, 1), position + step), cache)
        return answer, first

    def _layer(self, layer: Any, hidden: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """One decoder layer on a whole prompt, or on one more token, ``[n, d]``."""
        rotary = self.decoder.rotary_emb(hidden[None], positions)
        mask = torch.full((len(hidden), len(hidden)), -torch.inf).triu(1)[None, None] if len(hidden) > 1 else None
        named: dict[str, Any] = {"attention_mask": mask, "position_embeddings": rotary, "past_key_values": cache}
        out: Tensor = layer(hidden[None], use_cache=True, **named)[0]
        return out

    def _reduce_before(
        self,
        tokens: Tokens,
        spans: list[tuple[int, int]],
        reducer: Mapping[str, Any],
        counts: Sequence[int],
        position: int,
    ) -> int:
        """Selects among the tower's rows; places and spans become the shorter prompt's. Gives the next position."""

        def choose(_: int, at: list[int], count: int) -> Choice:
            rule = (reducer.get("select") or {"rule": "maxmin"})["rule"]
            if rule not in ("uniform", "maxmin"):
                raise NotImplementedError(rule)
            best = plain.every_nth(count, len(at)) if rule == "uniform" else plain.farthest(tokens.hidden[at], count)
            return best, torch.ones(len(at))

        self._choose(tokens, reducer, counts, choose)
        for i, (start, end) in enumerate(spans):
            left = ((tokens.place >= start) & (tokens.place < end)).nonzero()[:, 0]
            spans[i] = (int(left[0]), int(left[-1]) + 1)
        tokens.place = torch.arange(len(tokens.ids))
        if tokens.positions.ndim == 3:
            return position
        tokens.positions = tokens.place[None]
        return len(tokens.ids)

    def _queries(self, tokens: Tokens, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Places of the text that asks about each image: behind it, up to its window's end, between other images."""
        importance, length = self.profile["importance"], len(tokens.ids)
        inside = {place for start, end in spans for place in range(start, end)}
        asked = []
        for i, (_, end) in enumerate(spans):
            window = self._window(tokens.ids.tolist(), end) if importance["window"] == "turn" else length
            text = [place for place in range(end, window) if place not in inside] or [window - 1]
            if importance["queries"] == "last_text":
                text = text[-1:]
            elif importance["queries"] == "relevant_text":
                visual = tokens.hidden[tokens.image == i]
                text = [text[t] for t in plain.relevant(visual, tokens.hidden[text])]
            elif importance["queries"] != "all_text":
                raise NotImplementedError(importance["queries"])
            asked.append(text)
        return asked

    def _window(self, ids: list[int], start: int) -> int:
        """Place behind the first generation prompt at or behind ``start``; the prompt's end where there is none."""
        width = len(self.marker)
        starts = range(start, len(ids) - width + 1) if width else ()
        return next((at + width for at in starts if ids[at : at + width] == self.marker), len(ids))

    def _reduce(
        self,
        tokens: Tokens,
        attention: Tensor,
        queries: Sequence[Sequence[int]],
        reducer: Mapping[str, Any],
        counts: Sequence[int],
    ) -> None:
        """One reducer within the decoder; ``attention`` ``[H, n, n]`` is its layer's own."""
        where = {int(place): n for n, place in enumerate(tokens.place)}
        mean = attention.double().mean(dim=0)

        def choose(image: int, at: list[int], count: int) -> Choice:
            scores = mean[[where[place] for place in queries[image]]][:, at].mean(dim=0)
            ranked = scores.tolist()
            if at[-1] == len(tokens.ids) - 1:
                ranked[-1] = torch.inf  # the prompt ends in it, so the sampler reads it
            return plain.highest(ranked, count), scores

        self._choose(tokens, reducer, counts, choose)

    def _choose(
        self,
        tokens: Tokens,
        reducer: Mapping[str, Any],
        counts: Sequence[int],
        choose: Callable[[int, list[int], int], Choice],
    ) -> None:
        """Keeps ``counts`` visual tokens of each image, by ``choose(image, their places, count)``, and operates."""
        stays, hidden = torch.ones(len(tokens.ids), dtype=torch.bool), tokens.hidden.clone()
        for i, count in enumerate(counts):
            at = (tokens.image == i).nonzero()[:, 0].tolist()
            if count >= len(at):
                continue
            best, scores = choose(i, at, count) if count else ([], torch.zeros(len(at)))
            others = [n for n in range(len(at)) if n not in set(best)]
            kept, gone = [at[n] for n in best], [at[n] for n in others]
            stays[gone] = False
            if kept and not reducer.get("withdraw"):
                of = tokens.hidden[kept], tokens.hidden[gone], scores[others]
                hidden[kept] = plain.operate(*of, reducer, self.profile["operator"])
        tokens.hidden = hidden
        tokens.keep(stays)


@contextmanager
def caught_attention(layer: Any) -> Iterator[list[Tensor]]:
    """Attention weights ``[H, queries, keys]`` of the layer's calls within the block."""
    seen: list[Tensor] = []
    hook = layer.self_attn.register_forward_hook(lambda _, __, out: seen.append(out[1][0]))
    try:
        yield seen
    finally:
        hook.remove()
