"""``eos-vllm page``: the page that shows token reduction, in front of a server or with the embedded model."""

import argparse
import signal
import tempfile
from pathlib import Path
from typing import Any

from eos_vllm.cli.server_process import ServerError, serve
from eos_vllm.core.errors import EosError

PROFILE = "embedded-searched"
PORT = 8600


def add_parser(subparsers: Any) -> None:
    """Registers ``page``."""
    parser = subparsers.add_parser(
        "page",
        help="open the page in front of a server, or serve the embedded model with it",
        description="Without --base-url the embedded model is served with a profile and --eos-page. With it the page "
        "runs here and passes on what it asks for; what that server has no paths for is shown as not there.",
    )
    parser.add_argument("--base-url", metavar="URL", help="a running server, such as http://127.0.0.1:8000")
    parser.add_argument("--host", default="127.0.0.1", help="interface to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help="port of the page (default: %(default)s)")
    parser.add_argument(
        "--profile", default=PROFILE, help="profile of the embedded model, without --base-url (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs until it is interrupted; 0 then, 1 where the embedded model could not be served.

    Raises:
        EosError: no server framework is installed, or the address is none.
    """
    return run_embedded(args) if args.base_url is None else run_before(args)


def run_before(args: argparse.Namespace) -> int:
    """The page in front of ``--base-url``.

    Raises:
        EosError: as :func:`run`.
    """
    try:
        import uvicorn

        from eos_vllm.page.proxy import page_app
    except ImportError as error:
        remedy = "install the extra: pip install 'eos-vllm[serve]'"
        raise EosError("package", error.name or "fastapi", "is not installed", remedy) from error
    app = page_app(args.base_url)
    print(f"the page of {args.base_url}: {address(args.host, args.port)}", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


def run_embedded(args: argparse.Namespace) -> int:
    """The embedded model, served with a profile and the page.

    Raises:
        EosError: no such profile.
    """
    from eos_vllm import profiles
    from eos_vllm.models import embedded

    profiles.load(args.profile)
    # As Ctrl-C: a server of its own process group would be left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    flags = [*embedded_flags(args.profile), "--host", args.host]
    with tempfile.TemporaryDirectory(prefix="eos-page-") as folder:
        log = Path(folder) / "server.log"
        print(f"starting the embedded model with {args.profile}; its log: {log}", flush=True)
        try:
            with serve(embedded.path(), flags, log, {"VLLM_LOGGING_LEVEL": "INFO"}, args.port) as server:
                print(f"\nthe page: {address(args.host, args.port)}    (Ctrl-C ends it)", flush=True)
                server.process.wait()
        except ServerError as error:
            print(f"eos-vllm page: {error}", flush=True)
            return 1
        except KeyboardInterrupt:
            print("ended", flush=True)
            return 0
    print("eos-vllm page: the server ended by itself", flush=True)
    return 1


def embedded_flags(profile: str) -> list[str]:
    """Flags of ``vllm serve`` for the embedded model with the page."""
    flags = ["--eos-profile", profile, "--eos-page", "--dtype", "float32", "--enforce-eager", "--block-size", "32"]
    flags += ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(128 << 20), "--served-model-name", "embedded"]
    return [*flags, "--enable-prompt-tokens-details"]


def address(host: str, port: int) -> str:
    """Where a browser finds the page."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/eos/"
