"""ClutterVQA: small objects on cluttered backgrounds, and questions that need the right patches to be answered.

The benchmark of the embedded model: drawn by program, the same on every machine, free of charge and of licences.
"""

from eos_vllm.cluttervqa.dataset import SPLITS, Row, Sample, export, is_right, make_sample, read_rows, rows_of, samples
from eos_vllm.cluttervqa.questions import KINDS, WORDS, Question

__all__ = [
    "KINDS",
    "SPLITS",
    "WORDS",
    "Question",
    "Row",
    "Sample",
    "export",
    "is_right",
    "make_sample",
    "read_rows",
    "rows_of",
    "samples",
]
