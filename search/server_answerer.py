"""Who answers in an evaluation: a running server, asked as its clients ask it."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from eos_search.answerers import Case, picture
from eos_search.chats import messages, turns_of
from eos_vllm.cluttervqa import Row
from eos_vllm.core.budget import REQUEST_FIELD, RetainBudget, Share, plain
from eos_vllm.core.errors import EosError


class ServerAnswerer:
    """A running server with an OpenAI-compatible API; budgets go with each request.

    A server doesn't tell which profile it has: that is as the caller states.
    """

    def __init__(
        self, base_url: str, model: str, max_tokens: int = 8, unreduced: int | str | None = None, at_once: int = 16
    ) -> None:
        """Connects.

        Args:
            base_url: address, ``/v1`` included.
            model: name under which the model is served.
            max_tokens: longest answer.
            unreduced: budget with which a server with a profile answers unreduced; None: it has no profile.
            at_once: requests under way at a time.

        Raises:
            EosError: the server cannot be reached, or doesn't serve that model.
        """
        from openai import OpenAI

        self.client = OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=2)
        self.base_url, self.model, self.max_tokens, self.at_once = base_url, model, max_tokens, at_once
        self.unreduced = unreduced
        with self._told():
            served = [entry.id for entry in self.client.models.list()]
        if model not in served:
            raise EosError("--served-model", model, "is not served there", f"name one of {', '.join(served)}")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns an error of the client into one line."""
        from openai import OpenAIError

        try:
            yield
        except OpenAIError as error:
            raise EosError("--base-url", self.base_url, f"gave no answer ({error})", "look into its log") from error

    def answer(self, rows: Sequence[Row], cases: Sequence[Case], progress: Callable[[int], Any]) -> list[list[str]]:
        """As :class:`Answerer`.

        Raises:
            EosError: a selection or change that a server doesn't have, or a request that failed.
        """
        for case in cases:
            if case.selection or case.changed or case.blind:
                raise EosError("profile", case.name, "is not served", "leave --base-url out to use the reference")

        def ask(case: Case, row: Row) -> str:
            reply = self._ask(row, self.unreduced if case.profile is None else case.budget)
            progress(1)
            return reply

        with self._told(), ThreadPoolExecutor(self.at_once) as pool:
            return [list(pool.map(partial(ask, case), rows)) for case in cases]

    def _ask(self, row: Row, budget: RetainBudget | str | None) -> str:
        from eos_vllm.models.images import to_data_url

        images = [{"type": "image_url", "image_url": {"url": to_data_url(picture(file))}} for file in row.image_files]
        chat: list[Any] = messages(turns_of(row.prompt, row.history), images)
        asked = plain(budget) if isinstance(budget, int | Share) else budget
        reply = self.client.chat.completions.create(
            model=self.model,
            messages=chat,
            max_tokens=self.max_tokens,
            temperature=0,
            extra_body={} if asked is None else {"vllm_xargs": {REQUEST_FIELD: asked}},
        )
        return reply.choices[0].message.content or ""

    def close(self) -> None:
        """Closes connections."""
        self.client.close()
