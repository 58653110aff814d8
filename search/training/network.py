"""The embedded model while it trains: transformers' own modules on windows of the frame, and the auxiliary losses.

Windows keep the position embeddings and rotary positions that their patches have in the full frame, so that what is
learnt on small windows holds on the whole.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from eos_search.training.batches import FRAME_PATCHES, Batch, prefix_ids
from eos_vllm.cluttervqa.glyphs import TYPES
from eos_vllm.cluttervqa.scene import COLOUR_NAMES
from eos_vllm.models.embedded import SHAPE
from eos_vllm.models.model_files import model_config
from eos_vllm.models.tokenizer import EOS_ID

DEPTH = SHAPE.num_decoder_layers
SHALLOW = 4
# Where the layers of the shallow model go when it grows. Nothing is read from the image before layer 3: placed lower,
# answers would be settled before the first reducer.
PLACES = (3, 4, 5, 7)
EARLY = 3
_BACKGROUND = 0.15


def build(layers: int) -> Any:
    """A LLaVA of the embedded shape with so many decoder layers, weights fresh from the default generator."""
    config = model_config(SHAPE)
    config["text_config"]["num_hidden_layers"] = layers
    del config["architectures"], config["model_type"]
    model = LlavaForConditionalGeneration(LlavaConfig(**config))
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2 and "embed" not in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 0.8)
            if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                parameter.data.mul_(0.4)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
    _start_tower(model.model.vision_tower)
    return model


def _start_tower(tower: Any) -> None:
    """Sine-cosine positions, and queries near keys, so that a patch begins by looking at its neighbourhood."""
    width = SHAPE.vision_hidden_size
    axis = torch.arange(FRAME_PATCHES).float()
    frequency = (1 / 40) ** (torch.arange(width // 4).float() / (width // 4 - 1))
    waves = torch.cat([(axis[:, None] * frequency).sin(), (axis[:, None] * frequency).cos()], dim=1)
    grid = torch.cat([waves[:, None].expand(-1, FRAME_PATCHES, -1), waves[None].expand(FRAME_PATCHES, -1, -1)], dim=-1)
    with torch.no_grad():
        nn.init.zeros_(tower.embeddings.class_embedding)
        tower.embeddings.position_embedding.weight[1:] = grid.reshape(FRAME_PATCHES * FRAME_PATCHES, width)
        tower.embeddings.position_embedding.weight[0] = 0
        nn.init.normal_(tower.embeddings.patch_embedding.weight, std=(3 * SHAPE.patch_size**2) ** -0.5)
        for layer in tower.encoder.layers:
            attention = layer.self_attn
            noise = 0.5 * torch.randn_like(attention.k_proj.weight) * width**-0.5
            attention.q_proj.weight.copy_(attention.k_proj.weight + noise)


def grow(shallow: Any) -> Any:
    """The full depth from a shallow model: its layers at ``PLACES``, new ones that pass everything on at first.

    Layer 2 starts with the queries and keys of layer 3, so that the attention that a first reducer scores by looks
    where the next layer will look.
    """
    model = build(DEPTH)
    wanted = model.state_dict()
    for name, value in shallow.state_dict().items():
        parts = name.split(".")
        if "layers" in parts and "language_model" in parts:
            index = parts.index("layers") + 1
            parts[index] = str(PLACES[int(parts[index])])
        wanted[".".join(parts)] = value.clone()
    prefix = "model.language_model.layers"
    for layer in set(range(DEPTH)) - set(PLACES):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            wanted[f"{prefix}.{layer}.{part}.weight"].zero_()
    for part in ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj"):
        wanted[f"{prefix}.2.{part}.weight"] = wanted[f"{prefix}.3.{part}.weight"].clone()
    model.load_state_dict(wanted)
    return model


class Trainee(nn.Module):
    """The model with the heads of its auxiliary losses, which are thrown away in the end."""

    def __init__(self, model: Any, heads: nn.ModuleDict | None = None) -> None:
        super().__init__()
        self.model = model
        self.depth = len(model.model.language_model.layers)
        # Objects are found at one layer, what is to be seen of them one layer later.
        self.locating, self.seeing = (PLACES[1], PLACES[2]) if self.depth == DEPTH else (1, 2)
        hidden = SHAPE.hidden_size
        self.heads = heads or nn.ModuleDict(
            {
                "colour": nn.Linear(SHAPE.vision_hidden_size, len(COLOUR_NAMES) + 1),
                "kind": nn.Linear(SHAPE.vision_hidden_size, len(TYPES) + 1),
                "middle": nn.Linear(SHAPE.vision_hidden_size, 1),
                "place": nn.Linear(hidden, 2),
                "centre": nn.Linear(hidden, 2),
                "value": nn.Linear(hidden, SHAPE.vocab_size),
            }
        )

    def patches(self, batch: Batch) -> torch.Tensor:
        """The tower's output for each patch of the windows, ``[B, patches, vision width]``."""
        tower = self.model.model.vision_tower
        embedded = tower.embeddings.patch_embedding(batch.pixels)
        side = embedded.shape[-1]
        embedded = embedded.flatten(2).transpose(1, 2)
        first = tower.embeddings.class_embedding.expand(len(embedded), 1, -1)
        places = F.pad(1 + self.numbers(batch, side), (1, 0))
        hidden = torch.cat([first, embedded], dim=1) + tower.embeddings.position_embedding(places)
        hidden = tower.pre_layrnorm(hidden)
        return tower.encoder(inputs_embeds=hidden).last_hidden_state[:, 1:]

    @staticmethod
    def numbers(batch: Batch, side: int) -> torch.Tensor:
        """Number of each patch in the full frame, ``[B, side * side]``."""
        axis = torch.arange(side, device=batch.origin.device)
        rows, columns = batch.origin[:, :1] + axis, batch.origin[:, 1:] + axis
        return (rows[:, :, None] * FRAME_PATCHES + columns[:, None, :]).flatten(1)

    def tower_losses(self, batch: Batch, patches: torch.Tensor, visual: torch.Tensor) -> dict[str, torch.Tensor]:
        """Colour, kind and middle of objects from the tower's output; row and column from the projector's."""
        labels = batch.labels
        losses = {}
        for number, name in enumerate(("colour", "kind")):
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
        return losses

    def forward(
        self, batch: Batch, questions: bool = True, blind: bool = False
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Losses of a batch, and which questions are answered rightly ``[Q]``.

        Args:
            batch: images with questions.
            questions: False for the tower's losses only.
            blind: text does not see the image in the first ``EARLY`` layers, so that it is read later.
        """
        patches = self.patches(batch)
        visual = self.model.model.multi_modal_projector(patches)
        losses = self.tower_losses(batch, patches, visual)
        if not questions:
            return losses, None
        decoder = self.model.model.language_model
        prefix = torch.tensor(prefix_ids(), device=visual.device)
        before = len(prefix)
        text = decoder.embed_tokens(batch.ids)
        hidden = torch.cat([decoder.embed_tokens(prefix).expand(len(text), -1, -1), visual, text], dim=1)
        positions = torch.cat(
            [
                torch.arange(before, device=visual.device).expand(len(text), -1),
                before + self.numbers(batch, int(visual.shape[1] ** 0.5)),
                before + FRAME_PATCHES * FRAME_PATCHES + batch.offset,
            ],
            dim=1,
        )
        rotary = decoder.rotary_emb(hidden, positions)
        masks = attention_masks(batch.segment, before, visual.shape[1], blind and self.depth == DEPTH)
        start = before + visual.shape[1]
        for index, layer in enumerate(decoder.layers):
            hidden = layer(hidden, attention_mask=masks[min(index // EARLY, 1)], position_embeddings=rotary)
            if index == self.locating and len(batch.named):
                named = hidden[batch.named[:, 0], start + batch.named[:, 1]]
                losses["centre"] = 8 * F.mse_loss(self.heads["centre"](named), batch.centre)
            if index == self.seeing:
                seen = hidden[batch.asked[:, 0], start + batch.asked[:, 1]]
                losses["value"] = 0.5 * F.cross_entropy(self.heads["value"](seen), batch.value)
        hidden = decoder.norm(hidden)
        last = hidden[batch.asked[:, 0], start + batch.asked[:, 1]]
        behind = hidden[batch.asked[:, 0], start + batch.asked[:, 1] + 1]
        logits = self.model.lm_head(last)
        ends = self.model.lm_head(behind)
        losses["answer"] = F.cross_entropy(logits, batch.answer)
        losses["end"] = 0.1 * F.cross_entropy(ends, torch.full_like(batch.answer, EOS_ID))
        return losses, logits.argmax(dim=-1) == batch.answer


def attention_masks(segment: torch.Tensor, before: int, visual: int, blind: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What may see what, in the first layers and in the others, ``[B, 1, S, S]`` bool each.

    What stands before the text is plainly causal; each question sees that and itself, with ``blind`` not the image in
    the first layers.
    """
    owner = torch.cat([segment.new_full((len(segment), before + visual), -2), segment], dim=1)
    place = torch.arange(owner.shape[1], device=segment.device)
    same = (owner[:, None, :] == -2) | (owner[:, None, :] == owner[:, :, None])
    late = ((place[:, None] >= place) & same)[:, None]
    if not blind:
        return late, late
    is_text, is_visual = place >= before + visual, (place >= before) & (place < before + visual)
    return late & ~(is_text[:, None] & is_visual), late
