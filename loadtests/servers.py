"""The servers of a sweep: stock vLLM with its own defaults and one with a profile, side by side or one at a time."""

import json
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from eos_vllm.cli.server_process import Server, serve
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import Profile
from loadtests.grid import RESTRICTED, Kind

MODEL_NAME = "loadtest"
# For who wants to know what of a difference is the reduction, and what comes from vLLM's own reuse and scheduling.
RESTRICTED_FLAGS = ("--no-enable-prefix-caching", "--no-enable-chunked-prefill")


@dataclass(frozen=True)
class ServerSpec:
    """What all servers have in common, and the profile that only one has; nothing else differs from vLLM's defaults.

    Attributes:
        model: model directory, or a name that vLLM knows.
        profile: of the eos server.
        kv_bytes: size of the KV cache of each; vLLM's own choice where None.
        max_model_len: longest prompt and answer, in tokens.
        dtype: of weights and KV cache.
        arguments: further flags of all.
        eos_arguments: further flags of the eos server.
        environment: variables of all.
    """

    model: str
    profile: Profile
    kv_bytes: int | None
    max_model_len: int
    dtype: str = "float32"
    arguments: tuple[str, ...] = ()
    eos_arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def flags(self, kind: Kind, profile_file: Path) -> list[str]:
        """Flags of ``vllm serve`` behind the model."""
        eos = ("--eos-profile", str(profile_file), *self.eos_arguments)
        own: dict[str, tuple[str, ...]] = {"eos": eos, RESTRICTED: RESTRICTED_FLAGS}
        kv = [] if self.kv_bytes is None else ["--kv-cache-memory-bytes", str(self.kv_bytes)]
        return [
            *("--served-model-name", MODEL_NAME, "--dtype", self.dtype, *kv),
            *("--max-model-len", str(self.max_model_len), *self.arguments, *own.get(kind, ())),
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
        """Starts servers one after the other: side by side they compile for so long that the wait may end first.

        Raises:
            ServerError: one did not become healthy.
        """
        for kind in kinds:
            self._start(kind)

    def _start(self, kind: Kind) -> None:
        flags = self.spec.flags(kind, self._profile_file)
        stack = self._stacks[kind] = ExitStack()
        log = self.folder / f"{kind}.log"
        self.running[kind] = stack.enter_context(serve(self.spec.model, flags, log, self.spec.environment))

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
        with ThreadPoolExecutor(max(1, len(stacks))) as pool:
            list(pool.map(lambda stack: stack.close(), stacks.values()))


@contextmanager
def servers(spec: ServerSpec, kinds: Sequence[Kind], serial: bool = False) -> Iterator[Servers]:
    """Servers of these kinds for the length of a ``with`` block; with ``serial`` each starts when first asked for.

    Raises:
        ServerError: one did not become healthy.
    """
    with tempfile.TemporaryDirectory(prefix="eos-load-") as folder:
        pair = Servers(spec, Path(folder), serial)
        try:
            if not serial:
                pair.start(*kinds)
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

    def wait(self, seconds: float) -> None:
        """Waits until both say that they are healthy.

        Raises:
            SettingError: one does not after so many seconds.
        """
        deadline = time.monotonic() + seconds
        for kind, url in self.urls.items():
            while (problem := _unhealthy(url)) is not None:
                if time.monotonic() >= deadline:
                    remedy = "start it, give its address, or wait longer with --wait"
                    raise SettingError(f"{kind}-url", url, f"/health: {problem}, for {seconds:g} s", remedy)
                time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))


def _unhealthy(url: str) -> str | None:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as response:
            return None if response.status == 200 else f"status {response.status}"
    except urllib.error.HTTPError as e:
        return f"status {e.code}"
    except (OSError, ValueError) as e:
        return f"no answer ({getattr(e, 'reason', e)})"
