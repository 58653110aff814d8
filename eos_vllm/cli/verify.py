"""`eos-vllm verify`: the paper's Listing 3 on this machine, and the same on real hidden states of a model."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from eos_vllm.analysis.equivalence import Check, batch_check, corner_checks, gaussian_tokens
from eos_vllm.analysis.selector_checks import COUNTS, PATCHES, selector_checks
from eos_vllm.core.errors import SettingError
from eos_vllm.core.importance import complement, top_k

# The layer of the paper's check on real hidden states, and the share of visual tokens kept there (64 of 576).
_LAYER = 2
_KEEP_ONE_OF = 9
# Real tokens of one image are much alike: only a smaller stand-in for tau -> 0 tells their nearest anchors apart.
_REAL_MERGE_TAU = 1e-9
_PROMPT = "USER: <image>\nWhat is in the picture? ASSISTANT:"
_PIXELS = 336


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `verify` to the `eos-vllm` command."""
    parser = subparsers.add_parser(
        "verify",
        help="hold the unified operator against prune, merge, pool and reweight (the paper's Listing 3)",
        description="Check that the unified operator equals each canonical reduction at its corner. "
        "Exit code 1 if a bound is broken.",
    )
    parser.add_argument("--model", metavar="DIR", help="also check on layer 2 hidden states of this Hugging Face LLaVA")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="of the random tokens (default 42)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--selectors",
        action="store_true",
        help="also hold the selectors in front of the language model against plain loops",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print each difference with its bound; return 0 if all hold, otherwise 1."""
    gaussian = [*corner_checks(*gaussian_tokens(args.seed)), batch_check(args.seed)]
    parts = [("gaussian", f"Gaussian tokens, seed {args.seed}, largest difference", gaussian)]
    if args.model is not None:
        anchors, discards, scores = hidden_states(args.model)
        real = corner_checks(anchors, discards, scores, merge_tau=_REAL_MERGE_TAU, relative=True)
        shape = f"{len(anchors)} of {len(anchors) + len(discards)} visual tokens kept"
        parts.append(("hidden_states", f"layer {_LAYER} of {args.model}, {shape}, largest relative difference", real))
    if args.selectors:
        counts = ", ".join(map(str, COUNTS))
        title = (
            f"Selectors, {counts} of {PATCHES} patches, seed {args.seed}, patches that differ or relative difference"
        )
        parts.append(("selectors", title, selector_checks(args.seed)))
    ok = all(check.ok for _, _, checks in parts for check in checks)
    if args.json:
        document: dict[str, Any] = {"ok": ok, "seed": args.seed, "model": args.model}
        print(json.dumps(document | {key: [c.to_dict() for c in checks] for key, _, checks in parts}, indent=2))
    else:
        for _, title, checks in parts:
            print(title)
            width = max(9, *(len(check.check) for check in checks))
            print("\n".join(_line(check, width) for check in checks))
    return 0 if ok else 1


def _line(check: Check, width: int) -> str:
    note = f"  ({check.note})" if check.note else ""
    word = "ok  " if check.ok else "FAIL"
    return f"{word}  {check.check:<{width}} {check.difference:.2e}  bound {check.bound:.0e}{note}"


def hidden_states(directory: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Visual tokens that leave decoder layer 2 for a made-up image and a question, split by the attention they get.

    Args:
        directory: a local Hugging Face LLaVA with weights and processor; nothing is fetched.

    Returns:
        Kept tokens ``[K, d]``, discarded ones ``[M, d]`` and the scores of the latter ``[M]``, all float32. The score
        is layer 2's own attention, mean over heads and over the text behind the image.

    Raises:
        EosError: no such directory, or it holds no LLaVA that transformers can load.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    from eos_vllm.models.geometry import geometry
    from eos_vllm.models.images import sample_image

    remedy = "give the directory of a LLaVA with its weights and processor"
    if (depth := geometry(str(Path(directory))).num_decoder_layers) <= _LAYER:
        raise SettingError("model", directory, f"it has {depth} decoder layers", f"give one of {_LAYER + 1} or more")
    disable_progress_bar()
    try:
        # Eager attention is the one that hands out its weights.
        model = LlavaForConditionalGeneration.from_pretrained(
            directory, dtype="auto", attn_implementation="eager", local_files_only=True
        ).eval()
        processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SettingError("model", directory, f"it cannot be loaded ({error})", remedy) from None
    inputs = processor(text=_PROMPT, images=[sample_image(0, _PIXELS)], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    layer = model.model.language_model.layers[_LAYER]
    seen: dict[str, torch.Tensor] = {}
    layer.register_forward_hook(lambda _module, _args, out: seen.update(hidden=_first(out)[0]))
    layer.self_attn.register_forward_hook(lambda _module, _args, out: seen.update(attention=out[1][0]))
    with torch.no_grad():
        model(**inputs)
    visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    received = seen["attention"].float().mean(dim=0)[int(visual[-1]) + 1 :, visual].mean(dim=0)
    kept = top_k(received[None], max(1, len(visual) // _KEEP_ONE_OF))
    gone = complement(kept, len(visual))[0]
    tokens = seen["hidden"].float()[visual]
    return tokens[kept[0]], tokens[gone], received[gone]


def _first(out: Any) -> torch.Tensor:
    """Output of a decoder layer, which is a tensor or a tuple that begins with it, by the version of transformers."""
    return out[0] if isinstance(out, tuple) else out
