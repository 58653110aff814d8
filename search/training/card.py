"""Writes the embedded model's card from the raw results of its training and of its held-out evaluation.

    python -m eos_search.training.card [DIRECTORY]

DIRECTORY holds the model, that of the package by default. Accuracy below ``FLOORS`` gives no card. Every figure on the
card comes from ``results/``; nothing is measured here.
"""

import json
import sys
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import EosError
from eos_vllm.models.embedded import SHAPE, path
from eos_vllm.models.tiny import parameter_count
from eos_vllm.provenance import commit_line, machine_line

TRAINING = Path("results/embedded-training.json")
HELD_OUT = Path("results/embedded-heldout.json")
FLOORS = {"presence": 0.95, "attribute": 0.95, "average": 0.9}

_HEAD = """\
---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---

# eos-vllm embedded model

A LLaVA of {parameters:.2f} million parameters with 576 visual tokens per image, small enough to serve on two CPU cores
and good enough that keeping the right tokens decides the answer. It exists to test, show and search visual token
reduction where no weights can be downloaded. It knows nothing but ClutterVQA.

| part | size |
| --- | --- |
| vision tower | CLIP, {vision_layers} layers, width {vision_hidden_size}, {image_size}x{image_size} pixels |
| visual tokens | 576, from 24x24 patches of {patch_size}x{patch_size} pixels |
| projector | two layers, {vision_hidden_size} to {hidden_size} |
| language model | Llama, {num_decoder_layers} layers, width {hidden_size}, {num_attention_heads} heads of {head_dim} |
| tokenizer | byte-level, takes any text; {words} words of the benchmark are single tokens |
| weights | float16 under the tensor names of the published llava-hf checkpoints; computes in float32 |

## Use

```python
from eos_vllm.models import embedded
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(embedded.path())
processor = AutoProcessor.from_pretrained(embedded.path())
```

Prompts have LLaVA-1.5's form, `USER: <image>\\n… ASSISTANT:`, which the chat template writes. `eos-vllm demo` serves
the model with vLLM and a profile.

## Data

ClutterVQA (`eos_vllm/cluttervqa`), drawn by program: 2 to 6 objects of 12 to 20 pixels (four shapes, ten digits, six
letters, six colours) on cluttered, noisy backgrounds, and questions of six kinds whose answers cannot be guessed from
their text. The splits have disjoint seeds. Write some of it with `eos-vllm cluttervqa FOLDER`.

## Accuracy

Held out (`results/embedded-heldout.json`): {questions} questions about {images} images of the test split, all 576
visual tokens, greedy, transformers in float32; 95 % intervals by bootstrap over images. "Other image" is the same model
shown another image: what can be had without seeing.

| kind | questions | right, % | other image, % | chance, % |
| --- | --- | --- | --- | --- |
"""
_TAIL = """
## Training

`make embedded-model`; {minutes:.0f} minutes of training on {machine}, at commit {commit}, seed {seed}
(`results/embedded-training.json` holds settings, times and the log).

| stage | layers | steps | images a step (window in cells of 6x6 patches) | peak rate | minutes |
| --- | --- | --- | --- | --- | --- |
{stages}

* Windows are cut-outs of the full frame that keep their position embeddings and rotary positions, so that what is
  learnt on them holds on the whole frame.
* Ten questions share an image and don't see one another.
* Auxiliary losses, thrown away in the end: colour, kind and middle of objects from the tower's patches; row and column
  from the projector; an object's place at the token that names it; what is to be seen, at the token before the answer.
* The language model starts with 4 layers and grows to 8. The old layers become 3, 4, 5 and 7, and in a share of the
  steps text does not see the image in layers 0 to 2: answers are read from the image behind the first reducer, not
  before it.

## Limits

Images of other kinds, questions of other words, several images or turns: it was trained on none of them and answers
something. What token reduction costs, by kind and budget, is in the project's `docs/results.md`.
"""


def card(training: dict[str, Any], held_out: dict[str, Any]) -> str:
    """The card's text from the two raw results.

    Raises:
        EosError: the held-out result lacks the cases ``none`` and ``blind``.
    """
    from eos_vllm.cluttervqa import WORDS

    found = {case["profile"]: case["accuracy"] for case in held_out["cases"]}
    for name in ("none", "blind"):
        if name not in found:
            raise EosError("cases", name, "is missing", f"evaluate --profiles none,blind --out {HELD_OUT}")
    for kind, floor in FLOORS.items():
        if (share := found["none"].get(kind)) is not None and share["value"] < floor:
            raise EosError(
                kind, round(share["value"], 3), f"is below {floor}", "train again: this model is not good enough"
            )
    text = _HEAD.format(
        **vars(SHAPE),
        parameters=parameter_count(SHAPE) / 1e6,
        words=len(WORDS),
        questions=len(held_out["rows"]),
        images=len({row["image"] for row in held_out["rows"]}),
    )
    for kind, share in found["none"].items():
        low, high = (f"{100 * share[end]:.1f}" for end in ("low", "high"))
        text += f"| {kind} | {share['questions']} | {100 * share['value']:.1f} ({low} to {high}) "
        text += f"| {100 * found['blind'][kind]['value']:.1f} | {100 * held_out['chance'][kind]:.1f} |\n"
    source = training["provenance"]
    stages = "\n".join(
        f"| {s['name']} | {s['layers'] or 'tower only'} | {s['steps']} | "
        + ", ".join(f"{p['images']} ({p['cells']}{'' if p['questions'] else ', tower only'})" for p in s["parts"])
        + f" | {s['rate']:g} | {training['seconds'][s['name']] / 60:.1f} |"
        for s in training["stages"]
    )
    return text + _TAIL.format(
        minutes=sum(training["seconds"].values()) / 60,
        machine=machine_line(source),
        commit=commit_line(source),
        seed=source["seed"],
        stages=stages,
    )


def main() -> int:
    try:
        training, held_out = (json.loads(file.read_text(encoding="utf-8")) for file in (TRAINING, HELD_OUT))
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else path()
        (folder / "README.md").write_text(card(training, held_out), encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        print(f"eos-vllm card: no card can be made ({error}): run make embedded-model", file=sys.stderr)
        return 2
    except EosError as error:
        print(f"eos-vllm card: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
