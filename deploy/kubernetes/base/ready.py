"""Readiness of a server with a profile: exit code 0 when every worker has proven its reduction, else 1 and one line.

Asks ``GET /eos/status`` with the server's own API key (``VLLM_API_KEY``), at ``EOS_STATUS_URL`` or port 8000 here.
"""

import os
import sys
import urllib.error
import urllib.request

URL = os.environ.get("EOS_STATUS_URL", "http://127.0.0.1:8000/eos/status")
# More than the server gives its workers, which answer between two steps.
SECONDS = 7


def main() -> int:
    """Asks once, without a proxy."""
    request = urllib.request.Request(URL)
    if key := os.environ.get("VLLM_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=SECONDS):
            return 0
    except urllib.error.HTTPError as e:
        # The body of a 503 names the worker and what it lacks.
        print(f"{URL}: status {e.code}: {' '.join(e.read(400).decode(errors='replace').split())}")
    except OSError as e:
        print(f"{URL}: no answer ({getattr(e, 'reason', e)})")
    return 1


if __name__ == "__main__":
    sys.exit(main())
