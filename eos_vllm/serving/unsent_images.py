"""Images of refused requests, for others that were rendered while nobody knew of the refusal.

Symptom without it: a request with an image that a refused one held, too, ends in status 500 ("cache miss"). Cause: once
vLLM's front end has rendered a prompt, it takes the images for sent to the engine, and leaves them out of later
requests. A refusal can only come after that, for what is refused depends on tokens. Emptying the front end's cache
helps requests that are rendered later, not those that are rendered already. Why safe: an image is given to requests
that lack it only until some request carries it to the engine, which then has it under that name. Can go when vLLM notes
what was really sent, or lets a plugin check a prompt where it is rendered.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from vllm.multimodal.cache import LruKeyReplicatedSenderCache
from vllm.multimodal.cache.base import MultiModalCache

# More are lost from the oldest on. Requests that were rendered with an image are here within moments.
MOST_BYTES, SECONDS = 256 << 20, 30.0


class UnsentImages:
    """The images of one front end's refused requests, for a short time."""

    def __init__(self, renderer: Any, now: Callable[[], float] = time.monotonic) -> None:
        self.renderer, self.now = renderer, now
        self.images: OrderedDict[str, tuple[float, Any, int]] = OrderedDict()
        self.bytes = 0
        # The request that was checked last, until vLLM admits it.
        self.latest: Any = None
        # Others send all images, or their places in shared memory.
        self.leaves_out = isinstance(renderer.mm_processor_cache, LruKeyReplicatedSenderCache)

    def refuse(self, prompt: Any) -> None:
        """Keeps the images of a rendered prompt that the engine will not see, and has later ones send theirs again.

        Args:
            prompt: vLLM's engine input; one without ``mm_kwargs`` holds no images.
        """
        if not isinstance(prompt, dict) or not (found := prompt.get("mm_kwargs")):
            return
        if self.leaves_out:
            for modality, items in found.items():
                for name, item in zip(prompt["mm_hashes"][modality], items, strict=True):
                    if (item := item or self._held(name)) is not None:
                        self._keep(name, item)
            self._drop_old()
        self._send_again()

    def refuse_latest(self) -> None:
        """Does so for the request that was checked last: vLLM's own limits turn it away before anything else runs."""
        request, self.latest = self.latest, None
        features = [] if request is None else request.mm_features or []
        if not features:
            return
        if self.leaves_out:
            for feature in features:
                if feature.data is not None:
                    self._keep(feature.mm_hash, feature.data)
            self._drop_old()
        self._send_again()

    def complete(self, request: Any) -> None:
        """Gives a request the images that were left out of it, and that a refused one did not send."""
        if self.images:
            self._drop_old()
            for feature in request.mm_features or ():
                if feature.data is None:
                    feature.data = self._held(feature.mm_hash)

    def sent(self, request: Any) -> None:
        """The engine will see this request, if vLLM admits it: it has the images of these names from then on."""
        self.latest = request
        if self.images:
            for feature in request.mm_features or ():
                if feature.data is not None:
                    self._drop(feature.mm_hash)

    def _send_again(self) -> None:
        """Empties the front end's cache, where vLLM renders, so that images rendered from then on are sent."""
        emptied = self.renderer._mm_executor.submit(self.renderer.clear_mm_cache)
        try:
            asyncio.get_running_loop().call_later(SECONDS + 1, self._drop_old)
        except RuntimeError:
            emptied.result()  # no event loop here that waiting would hold up

    def _held(self, name: str | None) -> Any:
        return None if name is None or name not in self.images else self.images[name][1]

    def _keep(self, name: str, item: Any) -> None:
        self._drop(name)
        size = MultiModalCache.get_item_size(item)
        self.images[name] = self.now(), item, size
        self.bytes += size

    def _drop(self, name: str | None) -> None:
        if name is not None and name in self.images:
            self.bytes -= self.images.pop(name)[2]

    def _drop_old(self) -> None:
        oldest = self.now() - SECONDS
        while self.images and (self.bytes > MOST_BYTES or next(iter(self.images.values()))[0] < oldest):
            self._drop(next(iter(self.images)))
