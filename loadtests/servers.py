"""The servers of a sweep: a stock one and one with a profile, same flags, side by side or one at a time."""

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from eos_vllm.cli.server_process import Server, serve
from eos_vllm.core.profile import Profile
from loadtests.grid import Kind

MODEL_NAME = "loadtest"
# What the plugin switches off while a profile is active, so that both servers do the same work.
STOCK_FLAGS = ("--no-enable-prefix-caching", "--no-enable-chunked-prefill")
# The runner on which the plugin is proven; both servers get the same.
ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_LOGGING_LEVEL": "INFO"}


@dataclass(frozen=True)
class ServerSpec:
    """What both servers have in common, and the profile that only one has.

    Attributes:
        model: model directory, or a name that vLLM knows.
        profile: of the eos server.
        kv_bytes: size of the KV cache of each; vLLM's own choice where None.
        max_model_len: longest prompt and answer.
        max_num_batched_tokens: most tokens of an engine step.
        block_size: tokens per KV block.
        images: most images of a request.
        arguments: further flags of both.
        environment: variables of both.
    """

    model: str
    profile: Profile
    kv_bytes: int | None
    max_model_len: int
    max_num_batched_tokens: int
    block_size: int
    images: int = 2
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def flags(self, kind: Kind, profile_file: Path) -> list[str]:
        """Flags of ``vllm serve`` behind the model."""
        kv = [] if self.kv_bytes is None else ["--kv-cache-memory-bytes", str(self.kv_bytes)]
        return [
            *("--served-model-name", MODEL_NAME, "--block-size", str(self.block_size), *kv),
            *("--max-model-len", str(self.max_model_len)),
            *("--max-num-batched-tokens", str(self.max_num_batched_tokens)),
            *("--limit-mm-per-prompt", json.dumps({"image": self.images})),
            *self.arguments,
            *(STOCK_FLAGS if kind == "stock" else ("--eos-profile", str(profile_file))),
        ]


class Servers:
    """Gives the address of the server that a cell needs, and starts it if it must."""

    def __init__(self, spec: ServerSpec, folder: Path, serial: bool) -> None:
        self.spec = spec
        self.serial = serial
        self.folder = folder
        self.running: dict[Kind, Server] = {}
        self._stacks: dict[Kind, ExitStack] = {}
        self._profile_file = folder / "theta.json"
        self._profile_file.write_text(json.dumps(spec.profile.to_dict()))

    def start(self, *kinds: Kind) -> None:
        """Starts servers at the same time, which takes little longer than one.

        Raises:
            ServerError: one did not become healthy.
        """
        with ThreadPoolExecutor(len(kinds)) as pool:
            list(pool.map(self._start, kinds))

    def _start(self, kind: Kind) -> None:
        flags = self.spec.flags(kind, self._profile_file)
        stack = self._stacks[kind] = ExitStack()
        log = self.folder / f"{kind}.log"
        variables = ENVIRONMENT | self.spec.environment
        self.running[kind] = stack.enter_context(serve(self.spec.model, flags, log, variables))

    def url(self, kind: Kind) -> str:
        """Address of a running server of this kind.

        Raises:
            ServerError: as :meth:`start`.
        """
        if kind not in self.running:
            if self.serial:
                self.stop()
            self.start(kind)
        return self.running[kind].url

    def stop(self) -> None:
        """Ends all of them."""
        self.running.clear()
        stacks, self._stacks = self._stacks, {}
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda stack: stack.close(), stacks.values()))


@contextmanager
def servers(spec: ServerSpec, serial: bool = False) -> Iterator[Servers]:
    """Both servers for the length of a ``with`` block; with ``serial`` each starts when it is first asked for.

    Raises:
        ServerError: one did not become healthy.
    """
    with tempfile.TemporaryDirectory(prefix="eos-load-") as folder:
        pair = Servers(spec, Path(folder), serial)
        try:
            if not serial:
                pair.start("stock", "eos")
            yield pair
        finally:
            pair.stop()


class GivenServers:
    """Servers that somebody else runs."""

    def __init__(self, stock: str, eos: str) -> None:
        self.urls: dict[Kind, str] = {"stock": stock.rstrip("/"), "eos": eos.rstrip("/")}

    def url(self, kind: Kind) -> str:
        """Address of the server of this kind."""
        return self.urls[kind]
