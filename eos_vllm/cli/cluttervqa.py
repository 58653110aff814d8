"""``eos-vllm cluttervqa``: writes a split of the benchmark as PNG and JSONL, for load tests and other tools."""

import argparse
import os
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import SettingError


def add_parser(subparsers: Any) -> None:
    """Registers ``cluttervqa``."""
    text = "write images and questions of the embedded model's benchmark as PNG and JSONL"
    parser = subparsers.add_parser("cluttervqa", help=text, description=text)
    parser.add_argument("folder", type=Path, help="new or empty folder")
    parser.add_argument("--split", default="test", help="train, validation or test (default: %(default)s)")
    parser.add_argument("--images", type=int, default=100, help="from the split's first (default: %(default)s)")
    parser.add_argument(
        "--questions", type=int, default=None, help="per image; some admit fewer (default: one of each kind)"
    )
    parser.add_argument(
        "--benchmark-version", type=int, default=1, help="1, or 2: small things and strings (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one for each core")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the split and says where."""
    from eos_vllm.cluttervqa import export

    for name in ("images", "questions", "processes"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise SettingError(f"--{name}", value, "is below 1", "give 1 or more")
    file = export(args.folder, args.split, args.images, args.questions, args.processes, args.benchmark_version)
    with file.open(encoding="utf-8") as rows:
        lines = sum(1 for _ in rows)
    print(f"{args.images} images and {lines} questions: {file}")
    return 0
