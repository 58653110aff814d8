"""How many questions a second an engine answers under a profile at each cost, against stock in the same minute.

Both engines are up all the time, each in processes of its own as under ``vllm serve``, and take turns of a second or
two: a machine that is slow for a while is slow for both. Whose turn it is not stands still (SIGSTOP): vLLM's workers
spin while they wait, on the very cores that the other one is bound to.
"""

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eos_vllm.cluttervqa import Row
from eos_vllm.core.budget import REQUEST_FIELD
from eos_vllm.core.profile import Profile

REQUESTS, REPEATS = 48, 4


def speeds(
    model: Path, rows: Sequence[Row], wanted: Iterable[tuple[str, Profile, Sequence[int]]]
) -> Iterator[dict[str, Any]]:
    """Speeds of profiles one after the other, all of them against one engine of stock.

    Args:
        model: directory of the model.
        rows: questions, of which some are asked, each about an image that nothing has seen.
        wanted: name, profile and costs of each.

    Yields:
        ``profile``; by cost ``requests_per_second``, a list with a figure for each round; and ``stock``, in the order
        of time: round by round one figure in front of each cost.
    """
    stock: Engine | None = None
    try:
        for name, profile, costs in wanted:
            stock = stock or Engine(model, rows)
            ours = Engine(model, rows, profile, costs)
            entry: dict[str, Any] = {"profile": name, "stock": [], "requests_per_second": {str(c): [] for c in costs}}
            try:
                for repeat in range(REPEATS + 1):
                    for cost in costs:
                        theirs, own = stock.requests_per_second(), ours.requests_per_second(cost)
                        if repeat:  # the first round warms up
                            entry["stock"].append(theirs)
                            entry["requests_per_second"][str(cost)].append(own)
            finally:
                ours.close()
            yield entry
    finally:
        if stock is not None:
            stock.close()


def pairs(entry: Mapping[str, Any]) -> dict[int, tuple[list[float], list[float]]]:
    """By cost: requests per second of each round, and stock's in the turn right in front of it.

    For entries of before there were turns: the mean of all of stock's rounds.
    """
    ours = {int(cost): rounds for cost, rounds in entry["requests_per_second"].items()}
    stock = entry["stock"]
    if len(stock) != sum(map(len, ours.values())):
        return {cost: (rounds, [statistics.fmean(stock)] * len(rounds)) for cost, rounds in ours.items()}
    return {cost: (rounds, stock[place :: len(ours)]) for place, (cost, rounds) in enumerate(ours.items())}


class Engine:
    """vLLM with its own defaults and, where there is a profile, exact counts."""

    def __init__(
        self, model: Path, rows: Sequence[Row], profile: Profile | None = None, costs: Sequence[int] = ()
    ) -> None:
        """Starts it; ``rows`` are the questions, ``costs`` what it shall be asked at."""
        import psutil
        from PIL import Image
        from vllm import LLM

        earlier = set(psutil.Process().children(recursive=True))
        extra: dict[str, Any] = {}
        if profile is not None:
            eos = {"profile": profile.to_dict(), "retain": max(costs), "exact_counts": True}
            extra["additional_config"] = {"eos": eos}
        self.llm: Any = LLM(str(model), dtype="float32", max_model_len=2048, kv_cache_memory_bytes=256 << 20, **extra)
        chosen = rows[:: max(1, len(rows) // REQUESTS)][:REQUESTS]
        self.asked = [(row.prompt, Image.open(row.image_files[0]).convert("RGB")) for row in chosen]
        self.turn = 0
        self.processes = set(psutil.Process().children(recursive=True)) - earlier
        for process in self.processes:
            process.suspend()

    @contextmanager
    def _awake(self) -> Iterator[None]:
        for process in self.processes:
            process.resume()
        try:
            yield
        finally:
            for process in self.processes:
                process.suspend()

    def requests_per_second(self, cost: int | None = None) -> float:
        """Of all questions at once, about images that it has not seen; ``cost`` goes with each."""
        from vllm import SamplingParams

        self.turn += 1
        prompts = [
            {
                "prompt": f"USER: <image>\n{question} ASSISTANT:",
                "multi_modal_data": {"image": stamped(image, self.turn)},
            }
            for question, image in self.asked
        ]
        budget = {REQUEST_FIELD: cost} if cost else None
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, extra_args=budget)
        with self._awake():
            start = time.monotonic()
            self.llm.generate(prompts, params, use_tqdm=False)
            return round(len(prompts) / (time.monotonic() - start), 3)

    def close(self) -> None:
        """Ends it."""
        for process in self.processes:
            process.resume()
        self.llm.llm_engine.engine_core.shutdown()


def stamped(image: Any, number: int) -> Any:
    """The image with a number in its first pixels."""
    copy = image.copy()
    for i in range(4):
        copy.putpixel((i, 0), ((number >> (8 * i)) & 255, number % 251, i))
    return copy
