"""Writes tiny random-weight models with a family's true architecture, tensor names, processor and chat template.

6 decoder layers of width 128 with 4 heads of 32 (2 for keys), float32. Weights are made as those of
:mod:`eos_vllm.models.tiny`: attention is peaky, logits lie far apart, answers are printable.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save

from eos_vllm.models.tiny import random_tensor
from support.families import chats
from support.families.chats import VOCAB, Chat, token_id

DEPTH, WIDTH = 6, 128
IMAGE, VIDEO, PAD = (token_id(token) for token in ("<image>", "<video>", "<pad>"))
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
# A square of 56 pixels in patches of 7: 64 rows an image or tile, that of the class token left out.
_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
SIDE, PATCH = 56, 7
ROWS = (SIDE // PATCH) ** 2
CLIP = {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": PATCH, "projection_dim": 64, **_TOWER}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": PATCH, **_TOWER}
SIGLIP["vision_use_head"] = False
NEXT_TILINGS = [[SIDE * rows, SIDE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
ONEVISION_TILINGS = [[SIDE * rows, SIDE * columns] for rows in range(1, 7) for columns in range(1, 7)]
# Qwen's images: from 2 by 2 to 256 tokens.
MOST_TOKENS = 256

# From transformers' module names to those of the published checkpoints; the first that fits.
LLAVA_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.", ""),
)
QWEN2_5_NAMES = (("model.language_model.", "model."), ("model.visual.", "visual."))


def llava(language: str) -> tuple[Any, Any]:
    """LLaVA-1.5: one square, a row per patch."""
    config = hf.LlavaConfig(
        vision_config=CLIP,
        text_config=TEXT | {"model_type": language},
        image_token_index=IMAGE,
        image_seq_length=ROWS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    if language == "mistral":
        config.text_config.sliding_window = None
    images = hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = hf.LlavaProcessor(images, chats.VICUNA.tokenizer(), chat_template=chats.VICUNA.template, **_clip_rows())
    return config, processor


def llava_next() -> tuple[Any, Any]:
    """LLaVA-NeXT with Mistral: the whole image, then tiles, each row of patches closed by a newline."""
    config = hf.LlavaNextConfig(
        vision_config=CLIP,
        text_config=TEXT | {"model_type": "mistral", "sliding_window": None},
        image_token_index=IMAGE,
        image_seq_length=ROWS,
        image_grid_pinpoints=NEXT_TILINGS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    square = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    images, chat = hf.LlavaNextImageProcessor(image_grid_pinpoints=NEXT_TILINGS, **square), chats.MISTRAL
    return config, hf.LlavaNextProcessor(images, chat.tokenizer(), chat_template=chat.template, **_clip_rows())


def _clip_rows() -> dict[str, Any]:
    return {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }


def llava_onevision() -> tuple[Any, Any]:
    """LLaVA-OneVision: SigLIP, up to 36 tiles, more than nine tiles' patches scaled down to as many as nine have."""
    tiling = {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    config = hf.LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config=TEXT | {"model_type": "qwen2"},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        image_grid_pinpoints=ONEVISION_TILINGS,
        **tiling,
    )
    square = {"height": SIDE, "width": SIDE}
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=ONEVISION_TILINGS),
        chats.ONEVISION.tokenizer(),
        hf.LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=ROWS,
        image_token="<image>",
        video_token="<video>",
        chat_template=chats.ONEVISION.template,
        **tiling,
    )
    return config, processor


def _qwen_ids() -> dict[str, int]:
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{field}_token_id": token_id(f"<|{token}|>") for field, token in tokens.items()}


def qwen2_5_vl() -> tuple[Any, Any]:
    """Qwen2.5-VL: a token for every 28 by 28 pixels, window attention in the tower, M-RoPE."""
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "spatial_merge_size": 2,
        "out_hidden_size": WIDTH,
    }
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1000000.0}
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=TEXT | {"rope_parameters": rope},
        tie_word_embeddings=False,
        **_qwen_ids(),
    )
    pixels = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * MOST_TOKENS}
    processor = hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(**pixels),
        chats.QWEN2_5.tokenizer(),
        hf.Qwen2VLVideoProcessor(**pixels),
        chat_template=chats.QWEN2_5.template,
    )
    return config, processor


def qwen3_vl() -> tuple[Any, Any]:
    """Qwen3-VL: a token for every 32 by 32 pixels, interleaved M-RoPE, deepstack behind the first three layers."""
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    rope = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True, "rope_theta": 5000000.0}
    config = hf.Qwen3VLConfig(
        vision_config=vision,
        text_config=TEXT | {"rope_parameters": rope, "head_dim": 32},
        tie_word_embeddings=False,
        **_qwen_ids(),
    )
    shape: dict[str, Any] = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    shape["size"] = {"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * MOST_TOKENS}
    shape |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(**shape),
        chats.QWEN3.tokenizer(),
        hf.Qwen3VLVideoProcessor(**shape),
        chat_template=chats.QWEN3.template,
    )
    return config, processor


@dataclass(frozen=True)
class Family:
    """What a test must know of a family: how it is made, its vLLM class, its chats, names of its tensors.

    Attributes:
        has_video: whether vLLM's processor takes videos, too, which tests switch off.
        mrope: whether positions have three rows.
        visual_tokens: of every image; None where their number follows from its size.
    """

    make: Callable[[], tuple[Any, Any]]
    architecture: str
    chat: Chat
    names: tuple[tuple[str, str], ...] = LLAVA_NAMES
    has_video: bool = False
    mrope: bool = False
    visual_tokens: int | None = None

    @property
    def image_limits(self) -> dict[str, int]:
        """vLLM's ``limit_mm_per_prompt``: two images, no video."""
        return {"image": 2} | ({"video": 0} if self.has_video else {})


_LLAVA, _NEXT = "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"
_ONEVISION, _QWEN2_5 = "LlavaOnevisionForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"
FAMILIES: dict[str, Family] = {
    "llava-llama": Family(lambda: llava("llama"), _LLAVA, chats.VICUNA, visual_tokens=ROWS),
    "llava-mistral": Family(lambda: llava("mistral"), _LLAVA, chats.VICUNA, visual_tokens=ROWS),
    "llava-qwen2": Family(lambda: llava("qwen2"), _LLAVA, chats.VICUNA, visual_tokens=ROWS),
    "llava-next": Family(llava_next, _NEXT, chats.MISTRAL),
    "llava-onevision": Family(llava_onevision, _ONEVISION, chats.ONEVISION, has_video=True),
    "qwen2.5-vl": Family(qwen2_5_vl, _QWEN2_5, chats.QWEN2_5, QWEN2_5_NAMES, has_video=True, mrope=True),
    "qwen3-vl": Family(qwen3_vl, "Qwen3VLForConditionalGeneration", chats.QWEN3, (), has_video=True, mrope=True),
}


def weights(name: str, size: torch.Size) -> torch.Tensor:
    """Values of a tensor, by its published name: as the small LLaVA's, with what that one lacks."""
    values = random_tensor(name, tuple(size), seed=0)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return values + 0.5  # takes the place of the gain of queries and keys, which the norm undoes
    if name.endswith("ln_q.weight"):
        return 1 + 0.1 * values
    if name.endswith("pos_embed.weight"):  # spread as the other towers' positions are
        return values * size[1] ** 0.5
    return values


def write(family: str, directory: str | Path) -> Path:
    """Writes a model of the family to ``directory``, which vLLM and transformers read offline."""
    kind, path = FAMILIES[family], Path(directory)
    config, processor = kind.make()
    config.architectures, config.dtype = [kind.architecture], "float32"
    model = hf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=PAD)
    tensors = {}
    for name, parameter in model.named_parameters():
        old, new = next(((old, new) for old, new in kind.names if name.startswith(old)), ("", ""))
        published = new + name.removeprefix(old)
        tensors[published] = weights(published, parameter.shape)
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    model.generation_config.save_pretrained(path)
    processor.save_pretrained(path)
    (path / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    return path
