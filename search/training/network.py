"""The embedded model while it trains: transformers' own modules on windows of the frame, and the auxiliary losses.

What differs between models is their :class:`~eos_search.training.recipe.Recipe`. Windows keep the position embeddings
and rotary positions that their patches have in the full frame, so that what is learnt on small windows holds on the
whole.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eos_search.training.batches import FRAME_PATCHES, Batch, encode, prefix_ids
from eos_search.training.growth import Mixture, frame_waves
from eos_search.training.masks import attention_masks
from eos_search.training.recipe import CLUTTER1, Recipe, Thinning
from eos_vllm.cluttervqa.scene import COLOUR_NAMES
from eos_vllm.cluttervqa.small import ORDERS
from eos_vllm.models.tokenizer import EOS_ID

_BACKGROUND = 0.15
_POINTER = 64
# Weight of the distance to an object's centre, in shares of the frame.
_CENTRE = 8.0


class Trainee(nn.Module):
    """The model with the heads of its auxiliary losses, which are thrown away in the end."""

    waves: torch.Tensor

    def __init__(self, model: Any, heads: nn.ModuleDict | None = None, recipe: Recipe = CLUTTER1) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.depth = len(model.model.language_model.layers)
        self.full = self.depth == recipe.depth
        self.heads = heads or self._fresh_heads()
        self.register_buffer("waves", frame_waves(_POINTER), persistent=False)
        for name in self.heads:
            if isinstance(mixture := self.heads[name], Mixture) and len(mixture.weight) != self.depth:
                self.heads[name] = mixture.grown(recipe)

    def _fresh_heads(self) -> nn.ModuleDict:
        shape, benchmark = self.recipe.shape, self.recipe.benchmark
        hidden, vision = shape.hidden_size, shape.vision_hidden_size
        heads: dict[str, nn.Module] = {
            "centre": nn.Linear(hidden, 2),
            "colour": nn.Linear(vision, len(COLOUR_NAMES) + 1),
            "kind": nn.Linear(vision, len(benchmark.types) + 1),
            "middle": nn.Linear(vision, 1),
            "place": nn.Linear(hidden, 2),
        }
        if not self.recipe.pointers:
            heads["value"] = nn.Linear(hidden, shape.vocab_size)
            return nn.ModuleDict(heads)
        heads["order"] = nn.Linear(vision, ORDERS + 1)
        heads["whole"] = nn.Linear(vision, len(benchmark.scene_labels(benchmark.draw(random.Random(0)))))
        heads["value"] = nn.Linear(hidden, shape.vocab_size)
        for name in ("named", "aiming"):
            heads[name] = nn.Linear(hidden, _POINTER)
        if self.recipe.heads_at is None:
            for name in ("named_at", "aiming_at", "value_at"):
                heads[name] = Mixture(torch.zeros(self.depth))
        return nn.ModuleDict(heads)

    def layer_of(self, head: int) -> int:
        """The layer behind which an auxiliary loss stands: 0 for finding objects, -1 for seeing them."""
        assert self.recipe.heads_at is not None
        layer = self.recipe.heads_at[head]
        return self.recipe.places[layer] if self.full else layer

    def tower(self, batch: Batch) -> torch.Tensor:
        """The tower's output for the CLS token and each patch of the windows, ``[B, 1 + patches, vision width]``."""
        tower = self.model.model.vision_tower
        embedded = tower.embeddings.patch_embedding(batch.pixels)
        side = embedded.shape[-1]
        embedded = embedded.flatten(2).transpose(1, 2)
        first = tower.embeddings.class_embedding.expand(len(embedded), 1, -1)
        places = F.pad(1 + self.numbers(batch, side), (1, 0))
        hidden = torch.cat([first, embedded], dim=1) + tower.embeddings.position_embedding(places)
        hidden = tower.pre_layrnorm(hidden)
        return tower.encoder(inputs_embeds=hidden).last_hidden_state

    @staticmethod
    def numbers(batch: Batch, side: int) -> torch.Tensor:
        """Number of each patch in the full frame, ``[B, side * side]``."""
        axis = torch.arange(side, device=batch.origin.device)
        rows, columns = batch.origin[:, :1] + axis, batch.origin[:, 1:] + axis
        return (rows[:, :, None] * FRAME_PATCHES + columns[:, None, :]).flatten(1)

    def tower_losses(self, batch: Batch, tower: torch.Tensor, visual: torch.Tensor) -> dict[str, torch.Tensor]:
        """Colour, kind and middle of objects from the tower's patches; row and column from the projector's output.

        In version 2 also the places of characters in their strings, and what the whole window shows from the CLS token.
        """
        labels, patches = batch.labels, tower[:, 1:]
        losses = {}
        for number, name in (0, "colour"), (1, "kind"), (3, "order"):
            if number == labels.shape[-1]:
                break
            logits = self.heads[name](patches)
            weight = logits.new_ones(logits.shape[-1])
            weight[0] = _BACKGROUND
            losses[name] = F.cross_entropy(logits.flatten(0, 1), labels[..., number].flatten(), weight)
        middle = self.heads["middle"](patches)[..., 0]
        losses["middle"] = F.binary_cross_entropy_with_logits(
            middle, labels[..., 2].float(), pos_weight=middle.new_tensor(10.0)
        )
        numbers = self.numbers(batch, int(visual.shape[1] ** 0.5))
        place = torch.stack([numbers // FRAME_PATCHES, numbers % FRAME_PATCHES], dim=-1) / FRAME_PATCHES
        losses["place"] = 4 * F.mse_loss(self.heads["place"](visual), place)
        if self.recipe.pointers:
            losses["words"] = self.word_loss(batch, visual)
            losses["whole"] = F.binary_cross_entropy_with_logits(self.heads["whole"](tower[:, 0]), batch.whole)
        return losses

    def word_loss(self, batch: Batch, visual: torch.Tensor) -> torch.Tensor:
        """Patches of objects are like the words for them: how near the projector's output is to their embeddings."""
        embed = self.model.model.language_model.embed_tokens
        objects = batch.labels[..., 0] > 0
        shown, labels = F.normalize(visual[objects], dim=-1), batch.labels[objects] - 1
        loss = visual.new_zeros(())
        for number, names in enumerate((COLOUR_NAMES, self.recipe.benchmark.types)):
            ids = [torch.tensor(encode(f" {name}", batch.version), device=visual.device) for name in names]
            words = F.normalize(torch.stack([embed(word).sum(dim=0) for word in ids]), dim=-1)
            loss = loss + 0.5 * F.cross_entropy(10 * shown @ words.T, labels[:, number])
        return loss

    def forward(
        self, batch: Batch, questions: bool = True, blind: bool = False, thinning: Thinning | None = None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Losses of a batch, and which questions are answered rightly ``[Q]``.

        Args:
            batch: images with questions.
            questions: False for the tower's losses only.
            blind: text does not see the image in the recipe's ``unseeing`` layers.
            thinning: visual tokens that show no object and are dropped; None for none.
        """
        tower = self.tower(batch)
        visual = self.model.model.multi_modal_projector(tower[:, 1:])
        losses = self.tower_losses(batch, tower, visual)
        if not questions:
            return losses, None
        kept, numbers = self.thinned(batch, visual, thinning)
        visual = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1])) if thinning else visual
        decoder = self.model.model.language_model
        prefix = torch.tensor(prefix_ids(batch.version), device=visual.device)
        before, count = len(prefix), visual.shape[1]
        text = decoder.embed_tokens(batch.ids)
        hidden = torch.cat([decoder.embed_tokens(prefix).expand(len(text), -1, -1), visual, text], dim=1)
        compact = thinning is not None and thinning.compact
        places = torch.arange(count, device=visual.device).expand(len(text), -1) if compact else numbers
        positions = torch.cat(
            [
                torch.arange(before, device=visual.device).expand(len(text), -1),
                before + places,
                before + (count if compact else FRAME_PATCHES * FRAME_PATCHES) + batch.offset,
            ],
            dim=1,
        )
        rotary = decoder.rotary_emb(hidden, positions)
        unseen, seen = attention_masks(batch.segment, before, count, blind and self.full)
        start = before + count
        layers: list[torch.Tensor] = []
        for index, layer in enumerate(decoder.layers):
            mask = unseen if index in range(*self.recipe.unseeing) else seen
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
            layers.append(hidden)
            losses |= {} if self.recipe.pointers else self.centre_losses(batch, index, hidden, start)
        losses |= self.pointer_losses(batch, layers, numbers, start) if self.recipe.pointers else {}
        hidden = decoder.norm(hidden)
        last = hidden[batch.asked[:, 0], start + batch.asked[:, 1]]
        behind = hidden[batch.last[:, 0], start + batch.last[:, 1]]
        logits = self.model.lm_head(last)
        ends = self.model.lm_head(behind)
        losses["answer"] = F.cross_entropy(logits, batch.answer)
        losses["end"] = self.recipe.end * F.cross_entropy(ends, torch.full_like(batch.kind, EOS_ID))
        wrong = (logits.argmax(dim=-1) != batch.answer).long()
        right = torch.zeros_like(batch.kind).index_add_(0, batch.whose, wrong) == 0
        return losses, right & (ends.argmax(dim=-1) == EOS_ID) if self.recipe.pointers else right

    def thinned(
        self, batch: Batch, visual: torch.Tensor, thinning: Thinning | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in the window of the visual tokens that stay, ascending, and their numbers in the frame ``[B, K]``."""
        numbers = self.numbers(batch, int(visual.shape[1] ** 0.5))
        if thinning is None:
            return torch.arange(visual.shape[1], device=visual.device).expand(len(visual), -1), numbers
        objects = batch.labels[..., 0] > 0
        most = int(objects.sum(dim=1).max())
        keep = max(1, most + round(thinning.share * (visual.shape[1] - most)))
        lots = torch.rand(objects.shape, generator=torch.Generator().manual_seed(thinning.seed)).to(visual.device)
        kept = (lots + objects).topk(keep, dim=1).indices.sort(dim=1).values
        return kept, numbers.gather(1, kept)

    def centre_losses(self, batch: Batch, index: int, hidden: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
        """Behind one layer: centres of objects at tokens that name them, or what is to be seen before the answer."""
        losses: dict[str, torch.Tensor] = {}
        if index == self.layer_of(0) and len(batch.named):
            named = hidden[batch.named[:, 0], start + batch.named[:, 1]]
            losses["centre"] = _CENTRE * F.mse_loss(self.heads["centre"](named), batch.centre)
        if index == self.layer_of(-1):
            seen = hidden[batch.asked[:, 0], start + batch.asked[:, 1]]
            losses["value"] = 0.5 * F.cross_entropy(self.heads["value"](seen), batch.value)
        return losses

    def pointer_losses(
        self, batch: Batch, layers: Sequence[torch.Tensor], numbers: torch.Tensor, start: int
    ) -> dict[str, torch.Tensor]:
        """Names, and answers about one object, point at its patch; what is to be seen at the tokens before the answer.

        What points knows the patches ``[B, K]`` that are there by their places only: the place has to be read from the
        image. A loss stands behind one layer of the recipe, or behind its own mixture of all.
        """

        def at(name: str, head: int, where: torch.Tensor) -> torch.Tensor:
            found = [hidden[where[:, 0], start + where[:, 1]] for hidden in layers]
            if self.recipe.heads_at is None:
                return self.heads[f"{name}_at"](found)
            return F.rms_norm(found[self.layer_of(head)], found[0].shape[-1:])

        losses: dict[str, torch.Tensor] = {}
        asked = batch.asked[batch.aiming]
        for name, head, where, centre in (("named", 0, batch.named, batch.centre), ("aiming", 1, asked, batch.aim)):
            if not len(where):
                continue
            row, column = (centre * FRAME_PATCHES).long().unbind(dim=1)
            there = numbers[where[:, 0]].contiguous()
            target = torch.searchsorted(there, (row * FRAME_PATCHES + column)[:, None])[:, 0]
            state = at(name, head, where)
            if name == "named":  # which leads to the patch long before pointing at it succeeds
                losses["centre"] = _CENTRE * F.mse_loss(self.heads["centre"](state), centre)
            points = self.heads[name](state)
            logits = 0.5 * torch.einsum("nd,nkd->nk", points, self.waves[there])
            losses[name] = F.cross_entropy(logits, target)
        losses["value"] = 0.5 * F.cross_entropy(self.heads["value"](at("value", -1, batch.asked)), batch.value)
        return losses

    @torch.no_grad()
    def looking(self, batch: Batch) -> float:
        """How much more the CLS token looks at objects than at any patch, in the tower's last layer; 1 is by chance.

        Mean over heads and images of the attention on patches that show an object, by the share of such patches.
        """
        last = self.model.model.vision_tower.encoder.layers[-1]
        normed: list[torch.Tensor] = []
        hook = last.layer_norm1.register_forward_hook(lambda *call: normed.append(call[2]))
        self.tower(batch)
        hook.remove()
        split = (last.self_attn.num_heads, -1)
        query = last.self_attn.q_proj(normed[0]).unflatten(-1, split)
        key = last.self_attn.k_proj(normed[0]).unflatten(-1, split)
        weights = (torch.einsum("bhd,bnhd->bhn", query[:, 0], key) * query.shape[-1] ** -0.5).softmax(dim=-1)
        objects = (batch.labels[..., 0] > 0).float()
        on_objects = (weights[..., 1:].mean(dim=1) * objects).sum(dim=1) / weights[..., 1:].mean(dim=1).sum(dim=1)
        return float((on_objects / objects.mean(dim=1)).mean())
