"""Who answers in an evaluation, and what is asked; here the Hugging Face reference on this machine's cores."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from eos_search.chats import chat_prompt, marker_of
from eos_search.selection import EARLIER, SELECTIONS, rows_before, selection_scores
from eos_vllm.cluttervqa import Row
from eos_vllm.core.budget import RetainBudget
from eos_vllm.core.errors import EosError
from eos_vllm.core.profile import Profile

STOCK = "none"
BLIND = "blind"


@dataclass(frozen=True)
class Case:
    """What a table's cell is about: a profile at a budget, or a yardstick.

    Attributes:
        name: how tables call it.
        profile: the profile; None for the unreduced model.
        budget: retain budget per image; None for the profile's own.
        selection: who chooses in place of the question: ``random``, ``oracle``, ``earlier`` or None.
        blind: the model is shown another row's image.
        changed: what was changed in the profile: a corner of the operator, ``image``, a window or ``rounded``.
        block: tokens per KV block, to which removed tokens are rounded.
    """

    name: str
    profile: Profile | None
    budget: RetainBudget | None
    selection: str | None = None
    blind: bool = False
    changed: str | None = None
    block: int = 1


class Answerer(Protocol):
    """Answers rows in their order."""

    def answer(self, rows: Sequence[Row], cases: Sequence[Case], progress: Callable[[int], Any]) -> list[list[str]]:
        """Replies to ``rows`` in each case of one name; ``progress`` is told how many more are done."""


class ReferenceAnswerer:
    """The reference forward pass in processes of one thread each, greedy, float32.

    ``cpu_seconds`` is what all answers so far have taken; loading the model is not counted.
    """

    def __init__(self, model: str | Path, max_tokens: int = 8, processes: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.pool = ProcessPoolExecutor(
            processes or cores,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_load,
            initargs=(str(model), max_tokens),
        )
        self.model, self.cpu_seconds = str(model), 0.0

    def answer(self, rows: Sequence[Row], cases: Sequence[Case], progress: Callable[[int], Any]) -> list[list[str]]:
        """As :class:`Answerer`; questions about one image are answered together, which shares most of the work.

        Raises:
            EosError: an image that cannot be read, or a process that ended.
        """
        shown = blind_images(rows) if any(case.blind for case in cases) else [row.image_files for row in rows]
        places: dict[tuple[Path, ...], list[int]] = {}
        for i, images in enumerate(shown):
            places.setdefault(images, []).append(i)
        jobs = [(images, [rows[i] for i in wanted]) for images, wanted in places.items()]
        replies = [[""] * len(rows) for _ in cases]
        try:
            timed = self.pool.map(partial(_timed_replies, cases), jobs)
            for wanted, (answers, seconds) in zip(places.values(), timed, strict=True):
                self.cpu_seconds += seconds
                for found, per_case in zip(answers, replies, strict=True):
                    for i, reply in zip(wanted, found, strict=True):
                        per_case[i] = reply
                progress(len(wanted) * len(cases))
        except BrokenProcessPool:
            problem, remedy = "a process that answers has ended", "see its output above: no whole model, or no memory"
            raise EosError("model", Path(self.model).name, problem, remedy) from None
        return replies

    def close(self) -> None:
        """Ends the processes."""
        self.pool.shutdown(cancel_futures=True)


_WORKER: dict[str, Any] = {}


def _load(model: str, max_tokens: int) -> None:
    """Fills a worker process; the model is loaded once for all cases."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    _WORKER.update(model=loaded, processor=AutoProcessor.from_pretrained(model), max_tokens=max_tokens)


def _timed_replies(cases: Sequence[Case], job: tuple[Sequence[Path], Sequence[Row]]) -> tuple[list[list[str]], float]:
    """Replies, and the CPU-seconds of this process that they took."""
    start = time.process_time()
    return _replies(cases, job), time.process_time() - start


def _replies(cases: Sequence[Case], job: tuple[Sequence[Path], Sequence[Row]]) -> list[list[str]]:
    """Replies to all questions about the images of a job, in each case."""
    from eos_search.batched import answer_together
    from eos_search.reference import ReferenceModel

    images, rows = job
    pictures = [picture(file) for file in images]
    processor, max_tokens = _WORKER["processor"], _WORKER["max_tokens"]
    tokenizer, eos = processor.tokenizer, processor.tokenizer.eos_token_id
    profile = cases[0].profile
    # Of single questions the first turn ends with the prompt, wherever the template says so.
    pinned = profile is not None and profile.window == "turn" and any(row.history for row in rows)
    marker = marker_of(processor) if pinned else ()
    reference = ReferenceModel(_WORKER["model"], processor, profile, block=cases[0].block, marker=marker)
    entered: dict[int, tuple[list[Any], list[Any], Any]] = {}
    towers: dict[int, Any] = {}
    for case in cases:
        keep = 0 if reference.planner is None else reference.planner.image_tokens(case.budget)
        if keep not in entered:
            entered[keep] = _entering(reference, rows, pictures, case.budget, towers)
    vision = _WORKER["model"].config.vision_config
    side = vision.image_size // vision.patch_size
    earlier = rows_before(rows)
    replies: list[list[str]] = [[] for _ in cases]
    for case, found in zip(cases, replies, strict=True):
        keep = 0 if reference.planner is None else reference.planner.image_tokens(case.budget)
        asked, spans, shared = entered[keep]
        if case.selection is None and shared is not None:
            answers = answer_together(reference, asked, spans[0], shared, case.budget, max_tokens, eos)
            found.extend(tokenizer.decode(ids, skip_special_tokens=True) for ids in answers)
            continue
        for i, row in enumerate(rows):
            embeddings, ids = asked[i]
            scores: Any = None
            if case.selection in SELECTIONS:
                # Boxes are in pixels of the picture, which is square, whatever the model makes of it.
                scores = selection_scores(case.selection, row, side, pictures[0].width)
                if profile is not None and profile.before is not None:
                    # Chosen before the decoder: each question has an image of its own.
                    prompt = chat_prompt(processor, row.prompt, len(pictures), row.history)
                    embeddings, spans, _ = reference.embed(prompt, pictures, case.budget, scores, towers)
                    scores = shared = None
            elif case.selection == EARLIER:
                scores = reference.prefill(asked[earlier[i]][0], spans, case.budget, shared=shared).scores
            state = reference.prefill(embeddings, spans, case.budget, scores, shared, ids)
            ids = reference.answer(state, len(embeddings), max_tokens, eos).token_ids
            found.append(tokenizer.decode(ids, skip_special_tokens=True))
    return replies


def picture(file: Path) -> Image.Image:
    """An image file in RGB.

    Raises:
        EosError: it cannot be read.
    """
    try:
        return Image.open(file).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise EosError(
            "image_files", file.name, f"it cannot be read ({error})", "mend it, or leave out its rows"
        ) from None


def _entering(
    reference: Any, rows: Sequence[Row], pictures: Sequence[Any], budget: RetainBudget | None, towers: dict[int, Any]
) -> tuple[Any, Any, Any]:
    """Embeddings and token ids of each row, the images' spans, and what all of them share where that is one image."""
    before = shared = None
    asked: list[Any] = []
    for row in rows:
        prompt = chat_prompt(reference.processor, row.prompt, len(pictures), row.history)
        if before is None:
            embeddings, spans, ids = reference.embed(prompt, pictures, budget, seen_before=towers)
            if len(spans) == 1:
                before, head = embeddings[: spans[0].end], ids[: spans[0].end].tolist()
                shared = reference.share(before)
            asked.append((embeddings, ids.tolist()))
        else:
            embeddings, text = reference.behind(before, prompt)
            asked.append((embeddings, head + text.tolist()))
    return asked, spans, shared


def blind_images(rows: Sequence[Row]) -> list[tuple[Path, ...]]:
    """For each row the image of the next row with another image."""
    shown = [row.image_files for row in rows]
    step = next((i for i, files in enumerate(shown) if files != shown[0]), 0)
    # Rows of one image follow one another: a shift by the longest run always lands on another image.
    while step < len(shown) and any(a == b for a, b in zip(shown, shown[step:] + shown[:step], strict=True)):
        step += 1
    if step >= len(shown):
        raise EosError("rows", len(rows), "hold fewer than two images", "evaluate blind on more of them")
    return shown[step:] + shown[:step]
