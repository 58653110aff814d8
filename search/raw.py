"""Raw results: what was asked of what, so that replies are never taken for those of another model or profile."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eos_vllm.cluttervqa import Row
from eos_vllm.core.errors import EosError
from eos_vllm.core.profile import Profile

# What results say nothing of that are older than the field.
_FORMERLY = {"scorer": "exact"}
_REMEDY = "name a file of eos-search evaluate --out"


def behaviour(profile: Profile) -> dict[str, Any]:
    """What a profile does, as plain data: all but its name, its description and where it comes from."""
    talk = ("name", "description", "provenance")
    return {key: value for key, value in profile.to_dict().items() if key not in talk}


def digest(profile: Profile) -> str:
    """Digest of what a profile does, whatever it is called and wherever it comes from."""
    return hashlib.sha256(json.dumps(behaviour(profile), sort_keys=True).encode()).hexdigest()[:16]


def weights_digest(model: str | Path) -> str | None:
    """Digest of a model directory's weights; None for what is no directory with ``*.safetensors``."""
    files = sorted(Path(model).glob("*.safetensors"))
    if not files:
        return None
    return _digest_of(tuple((file, (about := file.stat()).st_mtime_ns, about.st_size) for file in files))


@functools.lru_cache(maxsize=8)
def _digest_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Reads files once; they are known by time of change and size, for those of a large model take a minute."""
    found = hashlib.sha256()
    for file, _, _ in files:
        with file.open("rb") as content:
            found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()[:16]


def fingerprint(rows: Sequence[Row]) -> str:
    """Digest of questions, answers, options, earlier turns and image names."""
    lines = []
    for r in rows:
        more = [list(part) for part in (r.answers, r.options, r.history)]
        line = f"{r.id}\t{r.prompt}\t{r.answer}\t{[f.name for f in r.image_files]}"
        lines.append(f"{line}\t{more}" if any(more) else line)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def plain(row: Row) -> dict[str, Any]:
    """What of a row is kept beside the replies."""
    image = row.image_files[0].name if row.image_files else ""
    more = {name: list(texts) for name, texts in (("answers", row.answers), ("options", row.options)) if texts}
    return {"id": row.id, "kind": row.kind, "form": row.form, "answer": row.answer, "image": image} | more


def read_result(file: str | Path) -> dict[str, Any]:
    """A raw result of an evaluation.

    Raises:
        EosError: it cannot be read, or is something else.
    """
    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EosError("result", str(file), f"cannot be read ({error})", _REMEDY) from error
    if not isinstance(result, dict) or "cases" not in result:
        raise EosError("result", str(file), "is no evaluation", _REMEDY)
    if not result["cases"]:
        raise EosError("result", str(file), "holds no case yet", _REMEDY)
    return result


def read_earlier(out: Path | None, result: Mapping[str, Any], same: Sequence[str]) -> list[dict[str, Any]]:
    """Cases of an earlier result that this one goes on from.

    Args:
        out: its file; nothing where there is none.
        result: the one to be.
        same: fields in which the two must agree.

    Raises:
        EosError: they differ in one.
    """
    if out is None or not out.exists():
        return []
    before = read_result(out)
    for name in same:
        if before.get(name, _FORMERLY.get(name)) != result.get(name):
            raise EosError("--out", str(out), f"holds an evaluation of another {name}", "name another file")
    return before["cases"]


def write_raw(file: Path, result: Mapping[str, Any]) -> None:
    """Writes a raw result, all or nothing; compact, for replies are many."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    part.replace(file)
