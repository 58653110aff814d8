"""ClutterVQA: small objects on cluttered backgrounds, and questions that need the right patches to be answered.

The benchmark of the embedded model: drawn by program, the same on every machine, free of charge and of licences.
Version 1 is the one of all results so far, and what every call means that names none. In version 2 nothing is larger
than two patches, and strings have a patch for each character: what is dropped is lost.
"""

from eos_vllm.cluttervqa.dataset import SPLITS, Sample, export, is_right, make_sample, rows_of, samples
from eos_vllm.cluttervqa.questions import KINDS, WORDS, Question
from eos_vllm.cluttervqa.rows import Row, read_rows
from eos_vllm.cluttervqa.versions import VERSIONS, Version, version_of

__all__ = [
    "KINDS",
    "SPLITS",
    "VERSIONS",
    "WORDS",
    "Question",
    "Row",
    "Sample",
    "Version",
    "export",
    "is_right",
    "make_sample",
    "read_rows",
    "rows_of",
    "samples",
    "version_of",
]
