"""Images of refused requests, for others that were rendered while nobody knew of the refusal.

Symptom without it: a request with an image that a refused one held, too, ends in status 500 ("cache miss"). Cause: once
vLLM's front end has rendered a prompt, it takes the images for sent to the engine, and leaves them out of later
requests. A refusal can only come after that, for what is refused depends on tokens. Emptying the front end's cache
helps requests that are rendered later, not those that are rendered already. Why safe: an engine that has the image
ignores it. Can go when vLLM notes what was really sent, or lets a plugin check a prompt where it is rendered.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

# More are lost from the oldest on. Requests that were rendered with an image are here within moments.
MOST, SECONDS = 64, 60.0


class UnsentImages:
    """The images of one front end's refused requests, for a short time."""

    def __init__(self, renderer: Any, now: Callable[[], float] = time.monotonic) -> None:
        self.renderer, self.now = renderer, now
        self.images: OrderedDict[str, tuple[float, Any]] = OrderedDict()
        # The prompt that was checked last, until vLLM admits it.
        self.latest: Any = None

    def refuse(self, prompt: Any) -> None:
        """Keeps the images of a rendered prompt that the engine will not see, and has later ones send theirs again.

        Args:
            prompt: vLLM's engine input; one without ``mm_kwargs`` holds no images.
        """
        if not isinstance(prompt, dict) or not (found := prompt.get("mm_kwargs")):
            return
        for modality, items in found.items():
            for name, item in zip(prompt["mm_hashes"][modality], items, strict=True):
                if (item := item or self._held(name)) is not None:
                    self.images[name] = self.now(), item
                    self.images.move_to_end(name)
        self._drop_old()
        emptied = self.renderer._mm_executor.submit(self.renderer.clear_mm_cache)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            emptied.result()  # no event loop here that waiting would hold up

    def refuse_latest(self) -> None:
        """Does so for the prompt that was checked last: vLLM refuses in the same turn of its event loop."""
        self.refuse(self.latest)
        self.latest = None

    def complete(self, request: Any) -> None:
        """Gives a request the images that were left out of it, and that a refused one did not send."""
        if not self.images:
            return
        self._drop_old()
        for feature in request.mm_features or ():
            if feature.data is None:
                feature.data = self._held(feature.mm_hash)

    def _held(self, name: str | None) -> Any:
        return None if name is None or name not in self.images else self.images[name][1]

    def _drop_old(self) -> None:
        oldest = self.now() - SECONDS
        while self.images and (len(self.images) > MOST or next(iter(self.images.values()))[0] < oldest):
            self.images.popitem(last=False)
