"""Small LLaVA models with random weights, for tests, the demo and benchmarks on machines without a GPU.

The weights are made for comparing implementations. Attention is peaky and differs between visual tokens, so that
selecting tokens by attention has clear winners; logits are far apart, so that greedy decoding in float32 gives the
same text in every implementation; images and questions change the answer. Answers are printable ASCII without meaning.
"""

import hashlib
import math
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors.torch import save

from eos_vllm.core.errors import EosError
from eos_vllm.models import embedded
from eos_vllm.models.model_files import LlavaShape, prepare_directory, write_model_files
from eos_vllm.models.tokenizer import FIRST_BYTE_ID, FIRST_FREE_ID

# Of the embedded model's size, with grouped-query attention and no words of its own: tests shall not lean on either.
EMBEDDED = replace(embedded.SHAPE, num_key_value_heads=2, vocab_size=FIRST_FREE_ID + 2)
BENCH_88M = LlavaShape(
    num_decoder_layers=12,
    hidden_size=768,
    intermediate_size=2048,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=64,
    vision_layers=4,
    vision_hidden_size=192,
    vision_attention_heads=3,
    vision_intermediate_size=768,
    image_size=96,
    patch_size=4,
    vision_feature_layer=-1,
)
PRESETS = {"embedded": EMBEDDED, "bench-88m": BENCH_88M}

# Standard deviation of a matrix's output for inputs of size 1, by the end of the tensor's name (1 if not named).
# Query and key: attention scores of about their product. Less blurs attention and lets answers fall into loops; more
# magnifies rounding errors (tenfold at 2.5), until two implementations give different text.
# o_proj and down_proj: what a layer adds to the residual stream. Logits: the wider apart, the rarer near-ties.
_GAINS = {
    "self_attn.q_proj.weight": 1.75,
    "self_attn.k_proj.weight": 1.75,
    "self_attn.o_proj.weight": 0.8,
    "mlp.down_proj.weight": 1.5,
    "self_attn.out_proj.weight": 0.5,
    "mlp.fc2.weight": 0.5,
    "lm_head.weight": 4.0,
}
_PRINTABLE = range(FIRST_BYTE_ID + 0x20, FIRST_BYTE_ID + 0x7F)


def tensor_shapes(shape: LlavaShape) -> dict[str, tuple[int, ...]]:
    """Return the size of every tensor of `shape` under its name in the published llava-hf checkpoints.

    transformers 5 saves LLaVA under other names, which vLLM's loader doesn't take; it loads these as well.
    """
    hidden, mlp, vocab = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    vision, vision_mlp = shape.vision_hidden_size, shape.vision_intermediate_size
    positions = (shape.image_size // shape.patch_size) ** 2 + 1

    tower = "vision_tower.vision_model"
    sizes: dict[str, tuple[int, ...]] = {
        f"{tower}.embeddings.class_embedding": (vision,),
        f"{tower}.embeddings.patch_embedding.weight": (vision, 3, shape.patch_size, shape.patch_size),
        f"{tower}.embeddings.position_embedding.weight": (positions, vision),
    }

    def linear(name: str, outputs: int, inputs: int) -> None:
        sizes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    # "pre_layrnorm" is how the published checkpoints spell it.
    norms = [f"{tower}.pre_layrnorm", f"{tower}.post_layernorm"]
    for layer in range(shape.vision_layers):
        name = f"{tower}.encoder.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{name}.self_attn.{projection}", vision, vision)
        linear(f"{name}.mlp.fc1", vision_mlp, vision)
        linear(f"{name}.mlp.fc2", vision, vision_mlp)
        norms += [f"{name}.layer_norm1", f"{name}.layer_norm2"]
    sizes.update({f"{norm}.{part}": (vision,) for norm in norms for part in ("weight", "bias")})

    linear("multi_modal_projector.linear_1", hidden, vision)
    linear("multi_modal_projector.linear_2", hidden, hidden)

    sizes["language_model.model.embed_tokens.weight"] = (vocab, hidden)
    for layer in range(shape.num_decoder_layers):
        name = f"language_model.model.layers.{layer}"
        sizes |= {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_proj.weight": (queries, hidden),
            f"{name}.self_attn.k_proj.weight": (keys, hidden),
            f"{name}.self_attn.v_proj.weight": (keys, hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, queries),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.mlp.gate_proj.weight": (mlp, hidden),
            f"{name}.mlp.up_proj.weight": (mlp, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, mlp),
        }
    sizes["language_model.model.norm.weight"] = (hidden,)
    sizes["language_model.lm_head.weight"] = (vocab, hidden)
    return sizes


def parameter_count(shape: LlavaShape, prefix: str = "") -> int:
    """Return the number of parameters of `shape` in tensors whose name begins with `prefix` (all by default)."""
    return sum(math.prod(size) for name, size in tensor_shapes(shape).items() if name.startswith(prefix))


def random_tensor(name: str, size: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return the float32 values of the tensor `name`; they depend on the name, the size and `seed` only.

    Uniform rather than normal numbers: they need no library function whose last bit differs between processors.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    unit = (torch.rand(size, generator=generator) * 2 - 1) * math.sqrt(3)  # mean 0, standard deviation 1
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * unit
    if name.endswith("bias"):
        return 0.1 * unit
    if name.endswith(("embed_tokens.weight", "position_embedding.weight", "class_embedding")):
        return unit
    gain = next((gain for ending, gain in _GAINS.items() if name.endswith(ending)), 1.0)
    values = unit * (gain / math.sqrt(math.prod(size[1:])))
    if name.endswith("lm_head.weight"):
        # A logit of 0 never wins: answers are readable, and neither the image token nor the end token is generated.
        keep = torch.zeros(size[0], 1)
        keep[_PRINTABLE] = 1
        values = values * keep
    return values


def write_tiny_model(
    directory: str | Path, *, shape: LlavaShape = EMBEDDED, seed: int = 0, **overrides: int | float | str
) -> Path:
    """Write a complete small LLaVA with random float32 weights to `directory` and return it.

    `overrides` are fields of `LlavaShape` that replace those of `shape`, such as `num_decoder_layers=4`.
    The same shape and seed give the same bytes in every file, on every machine.

    Raises EosError for an unknown field, sizes that don't fit together, or a directory that holds anything, OSError
    if writing fails.
    """
    unknown = sorted(set(overrides) - {field.name for field in fields(LlavaShape)})
    if unknown:
        raise EosError(unknown[0], overrides[unknown[0]], "no such size", "name a field of LlavaShape")
    shape = replace(shape, **overrides)  # type: ignore[arg-type]
    path = prepare_directory(directory)
    write_model_files(shape, path)
    tensors = {name: random_tensor(name, size, seed) for name, size in tensor_shapes(shape).items()}
    # Not save_file, which leaves the file readable to its owner only: another user may serve it from a container.
    (path / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    return path
