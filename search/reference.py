"""The reference: a frozen Hugging Face LLaVA with hard top-K reducers, one request at a time.

It shares operator, importance and plan with the server and nothing else: plain transformers layers, a transformers
cache whose layers differ in length, no paging, no batching. What the server answers is held against it token by token.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from eos_search.tower import entering_tokens
from eos_vllm.core.budget import RetainBudget
from eos_vllm.core.errors import SettingError
from eos_vllm.core.importance import MEAN, ScoreOptions
from eos_vllm.core.layout import Entry, build_layout
from eos_vllm.core.plan import ImageSpan, Planner, RequestPlan
from eos_vllm.core.profile import Profile
from eos_vllm.core.reduction import image_query_weights, reduce_tokens
from eos_vllm.core.selectors import TowerOutput


@dataclass
class Prefill:
    """State after the prompt.

    Attributes:
        plan: what was kept.
        hidden: final hidden states of the tokens left ``[kept, d]``.
        kept: unreduced positions left after each reducer, ascending, text included.
        cache: keys and values; layers of one segment are of one length.
        scores: by reducer, importance of the visual tokens that it chose from; with one image only.
    """

    plan: RequestPlan
    hidden: torch.Tensor
    kept: list[torch.Tensor]
    cache: DynamicCache
    scores: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Generation:
    """A greedy answer: its tokens, and the log-probabilities of all tokens at each step ``[steps, vocabulary]``."""

    token_ids: list[int]
    logprobs: torch.Tensor
    prefill: Prefill


@dataclass(frozen=True)
class SharedPrefix:
    """What the first tokens of several prompts leave behind in the decoder layers up to the first reducer.

    Questions about one image share all that stands before their text; it is worked out once.

    Attributes:
        outputs: of each of those layers ``[prefix, d]``.
        cache: its keys and values.
    """

    outputs: list[torch.Tensor]
    cache: DynamicCache

    @property
    def tokens(self) -> int:
        """Tokens of the prefix."""
        return len(self.outputs[0])


class ReferenceModel:
    """A Hugging Face LLaVA with a Llama-family language model, and perhaps a profile."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        profile: Profile | None,
        retain: int | None = None,
        block: int = 1,
        marker: Sequence[int] = (),
    ) -> None:
        """Wraps a loaded model; its weights stay as they are. ``block`` and ``marker`` are those of
        :class:`~eos_vllm.core.plan.Planner`.

        Raises:
            SettingError: the profile was made for another depth.
        """
        self.model = model.eval()
        self.processor = processor
        self.planner = None if profile is None else Planner(profile, retain, block, marker)
        self.decoder: Any = model.model.language_model
        depth = len(self.decoder.layers)
        if profile is not None and profile.model.num_decoder_layers != depth:
            problem, remedy = f"the model has {depth} decoder layers", "use a profile made for it"
            raise SettingError("profile.model.num_decoder_layers", profile.model.num_decoder_layers, problem, remedy)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        profile: Profile | None,
        retain: int | None = None,
        dtype: torch.dtype = torch.float32,
        block: int = 1,
        marker: Sequence[int] = (),
    ) -> "ReferenceModel":
        """Loads model and processor with transformers."""
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        return cls(model, AutoProcessor.from_pretrained(path), profile, retain, block, marker)

    @torch.no_grad()
    def embed(
        self,
        prompt: str,
        images: Sequence[Image.Image],
        budget: RetainBudget | None = None,
        scores: torch.Tensor | None = None,
        seen_before: MutableMapping[int, TowerOutput] | None = None,
    ) -> tuple[torch.Tensor, list[ImageSpan], torch.Tensor]:
        """Turns a prompt into what enters decoder layer 0.

        Args:
            prompt: text with one ``<image>`` for each image.
            images: the images.
            budget: this request's retain budget; a reducer before the decoder needs it here already.
            scores: ``[patches]``, whose highest that reducer keeps in place of its selector's choice.
            seen_before: as of :func:`~eos_search.tower.entering_tokens`.

        Returns:
            Embeddings ``[tokens, d]``, image spans, token ids ``[tokens]``.
        """
        inputs = self.processor(text=prompt, images=list(images) or None, return_tensors="pt")
        ids = inputs["input_ids"][0].to(self.model.device)
        if self.planner is None or self.planner.profile.before is None or not images:
            return (*embed_inputs(self.model, ids, inputs.get("pixel_values")), ids)
        profile, keep = self.planner.profile, self.planner.image_tokens(budget)
        pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        tokens = entering_tokens(self.model, pixels, profile, keep, scores, seen_before)
        visual = ids == self.model.config.image_token_id
        # Of each image the first K placeholders stay.
        ids = ids[~visual | ((visual.cumsum(dim=0) - 1) % profile.model.visual_tokens < keep)]
        embeddings = self.model.get_input_embeddings()(ids)
        places = (ids == self.model.config.image_token_id).nonzero()[:, 0]
        embeddings[places] = torch.cat(tokens).to(embeddings.dtype)
        spans = [ImageSpan(int(places[i * keep]), keep) for i in range(len(tokens))]
        return embeddings, spans, ids

    @torch.no_grad()
    def behind(self, before: torch.Tensor, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings ``[tokens, d]`` of a prompt with one image, given those up to its end ``[prefix, d]`` from another
        prompt, and the token ids behind it."""
        ids = torch.tensor(self.processor.tokenizer(prompt).input_ids, device=before.device)
        text = ids[int((ids == self.model.config.image_token_id).nonzero()[0, 0]) + 1 :]
        return torch.cat([before, self.model.get_input_embeddings()(text)]), text

    @torch.no_grad()
    def prefill(
        self,
        embeddings: torch.Tensor,
        spans: Sequence[ImageSpan],
        budget: RetainBudget | None = None,
        scores: torch.Tensor | Sequence[torch.Tensor] | None = None,
        shared: SharedPrefix | None = None,
        ids: Sequence[int] | None = None,
    ) -> Prefill:
        """Runs the prompt through the decoder layers, with a reducer after each active one.

        Args:
            embeddings: ``[tokens, d]``.
            spans: the images.
            budget: this request's retain budget.
            scores: importance of the image's tokens ``[visual tokens]`` in place of attention, for baselines such as
                random selection, or :attr:`Prefill.scores` of another question; one image only.
            shared: :meth:`share` of the same first tokens, under any profile with the same first reducer.
            ids: tokens of the prompt, for windows that end at the chat template's marker.
        """
        if scores is not None and len(spans) != 1:
            raise SettingError(
                "scores", len(spans), "is the number of images, not 1", "give scores with one image only"
            )
        tokens = len(embeddings)
        plan = (
            RequestPlan(tokens, (), ())
            if self.planner is None
            else self.planner.plan(tokens if ids is None else ids, spans, budget)
        )
        cache = DynamicCache(config=self.decoder.config)
        layout = weights = None
        options = MEAN
        if self.planner is not None and plan.reduces:
            profile = self.planner.profile
            options = ScoreOptions.of(
                profile.importance, self.model.config.text_config.num_attention_heads, embeddings.device
            )
            rule = profile.importance.queries
            layout = build_layout([Entry(tokens, plan)], profile.num_segments, rule, embeddings.device)
            weights = image_query_weights(rule, embeddings, layout)
        hidden, positions = embeddings, torch.arange(tokens, device=embeddings.device)
        kept: list[torch.Tensor] = []
        chosen_by: list[torch.Tensor] = []
        for index, layer in enumerate(self.decoder.layers):
            rotary = self.decoder.rotary_emb(hidden[None], positions[None])
            if shared is not None and index < len(shared.outputs):
                out = self._behind(shared, index, hidden, rotary, cache)
            else:
                out = layer(hidden[None], position_embeddings=rotary, past_key_values=cache, use_cache=True)[0]
            if self.planner is None or layout is None or index not in self.planner.profile.layers:
                hidden = out
                continue
            reducer = self.planner.profile.layers.index(index)
            query, key = rotated_queries_and_keys(layer, hidden, rotary)
            params = self.planner.profile.operator_params(reducer)
            scale = layer.self_attn.scaling
            step, instead = layout.steps[reducer], None
            if len(spans) == 1 and step.groups and step.groups[0].keep:  # a withdrawal chooses nothing
                group = step.groups[0]
                given = None
                if isinstance(scores, torch.Tensor):
                    left = positions[group.first_visual : group.first_visual + group.total] - spans[0].start
                    given = scores[left]
                elif scores is not None:
                    given = scores[len(chosen_by)]
                instead = _Scores(given, chosen_by)
            hidden, source = reduce_tokens(out, query, key, step, weights, params, scale, options, positions, instead)
            positions = positions[source]
            kept.append(positions)
        return Prefill(plan, self.decoder.norm(hidden), kept, cache, chosen_by)

    @torch.no_grad()
    def share(self, embeddings: torch.Tensor) -> SharedPrefix:
        """Runs the first tokens of prompts ``[prefix, d]`` through the layers that no reducer has touched yet."""
        layers = self.decoder.layers
        if self.planner is not None:
            layers = layers[: self.planner.profile.layers[0] + 1] if self.planner.profile.layers else layers
        cache, hidden, outputs = DynamicCache(config=self.decoder.config), embeddings[None], []
        positions = torch.arange(len(embeddings), device=embeddings.device)
        rotary = self.decoder.rotary_emb(hidden, positions[None])
        for layer in layers:
            hidden = layer(hidden, position_embeddings=rotary, past_key_values=cache, use_cache=True)
            outputs.append(hidden[0])
        return SharedPrefix(outputs, cache)

    def _behind(
        self,
        shared: SharedPrefix,
        index: int,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: DynamicCache,
    ) -> torch.Tensor:
        """Output of a layer for a whole prompt, of which the prefix is known."""
        known: Any = shared.cache.layers[index]
        cache.update(known.keys, known.values, index)
        text = hidden[shared.tokens :]
        row = torch.arange(shared.tokens, len(hidden), device=hidden.device)
        unseen = torch.arange(len(hidden), device=hidden.device) > row[:, None]
        mask = torch.zeros_like(unseen, dtype=hidden.dtype).masked_fill_(unseen, -torch.inf)
        behind = (rotary[0][:, shared.tokens :], rotary[1][:, shared.tokens :])
        layer = self.decoder.layers[index]
        out = layer(
            text[None],
            attention_mask=mask[None, None],
            position_embeddings=behind,
            past_key_values=cache,
            use_cache=True,
        )
        return torch.cat([shared.outputs[index], out[0]])

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        images: Sequence[Image.Image] = (),
        max_tokens: int = 32,
        budget: RetainBudget | None = None,
        scores: torch.Tensor | None = None,
        stop: int | None = None,
    ) -> Generation:
        """Answers greedily, ``max_tokens`` tokens or up to ``stop``; positions go on from the unreduced prompt."""
        embeddings, spans, ids = self.embed(prompt, images, budget)
        return self.answer(
            self.prefill(embeddings, spans, budget, scores, ids=ids.tolist()), len(embeddings), max_tokens, stop
        )

    @torch.no_grad()
    def answer(self, state: Prefill, prompt_length: int, max_tokens: int, stop: int | None = None) -> Generation:
        """Goes on greedily behind a prefill; ``prompt_length`` counts the unreduced prompt."""
        hidden, ids, logprobs = state.hidden[-1:], [], []
        for step in range(max_tokens):
            logits = self.model.lm_head(hidden)[0].float()
            logprobs.append(logits.log_softmax(dim=-1))
            ids.append(int(logits.argmax()))
            if ids[-1] == stop:
                break
            if step + 1 < max_tokens:
                hidden = self._decode(ids[-1], prompt_length + step, state.cache)
        return Generation(ids, torch.stack(logprobs), state)

    def _decode(self, token: int, position: int, cache: DynamicCache) -> torch.Tensor:
        device = self.decoder.norm.weight.device
        hidden = self.model.get_input_embeddings()(torch.tensor([[token]], device=device))
        rotary = self.decoder.rotary_emb(hidden, torch.tensor([[position]], device=device))
        for layer in self.decoder.layers:
            hidden = layer(hidden, position_embeddings=rotary, past_key_values=cache, use_cache=True)
        return self.decoder.norm(hidden)[0]


@torch.no_grad()
def embed_inputs(
    model: Any, ids: torch.Tensor, pixel_values: torch.Tensor | None
) -> tuple[torch.Tensor, list[ImageSpan]]:
    """Embeddings ``[tokens, d]`` that enter decoder layer 0, and the image spans.

    Args:
        model: a Hugging Face LLaVA.
        ids: token ids ``[tokens]``, image tokens expanded, on the model's device.
        pixel_values: processed images ``[images, 3, height, width]`` in prompt order; None for text only.
    """
    embeddings = model.get_input_embeddings()(ids)
    spans: list[ImageSpan] = []
    if pixel_values is not None:
        config = model.config
        features = model.model.get_image_features(
            pixel_values=pixel_values.to(embeddings.device, embeddings.dtype),
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        ).pooler_output
        visual = (ids == config.image_token_id).nonzero()[:, 0].tolist()
        start = 0
        for feature in features:
            spans.append(ImageSpan(visual[start], len(feature)))
            embeddings[visual[start] : visual[start] + len(feature)] = feature.to(embeddings.dtype)
            start += len(feature)
    return embeddings, spans


@dataclass(frozen=True)
class _Scores:
    """Keeps the scores ``[1, tokens]`` that one reducer works with: those given, else the attention's."""

    given: torch.Tensor | None
    used: list[torch.Tensor]

    def __call__(self, measured: torch.Tensor) -> torch.Tensor:
        scores = measured if self.given is None else self.given.unsqueeze(0)
        self.used.append(scores[0])
        return scores


def rotated_queries_and_keys(
    layer: Any, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A Llama layer's own queries ``[tokens, H, D]`` and keys ``[tokens, Hk, D]`` for its input ``[tokens, d]``."""
    normed = layer.input_layernorm(hidden)
    return rotated(layer, layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed), rotary)


def rotated(
    layer: Any, query: torch.Tensor, key: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from what the layer's projections gave ``[..., tokens, H D]`` and ``[..., tokens, Hk D]``."""
    dim = layer.self_attn.head_dim
    query, key = (x.view(1, x.shape[-2], -1, dim).transpose(1, 2) for x in (query, key))
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    return query[0].transpose(0, 1), key[0].transpose(0, 1)
