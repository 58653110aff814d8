"""Where a result came from, with the command as it is typed."""

import re
from typing import Any

from eos_vllm.provenance import provenance


def origin(**more: Any) -> dict[str, Any]:
    """As :func:`eos_vllm.provenance.provenance`, but for modules that are run with ``python -m``."""
    facts = provenance(**more)
    return facts | {
        "command": re.sub(r"^python (loadtests|benchmarks)/(\w+)\.py", r"python -m \1.\2", facts["command"])
    }
