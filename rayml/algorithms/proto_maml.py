"""Proto-MAML (Triantafillou et al. 2020, arXiv 1903.03096) for language models, by first order.

Inner steps descend the loss of the label tokens and of leave-one-out prototypes; queries are answered, and the start is
learned, by a learned mix of both at the adapted weights (`rayml.algorithms.prototypes`). It costs one more forward and
backward of the support. With one shot a class no example can be left out: then label tokens alone are descended. Free
text is learned as by `fomaml_plus`.
"""

from typing import Literal

from rayml.algorithms.fomaml import FomamlPlus


class ProtoMaml(FomamlPlus):
    """First-order MAML with learned rates, read out of prototypes and label tokens together."""

    readout: Literal["labels", "prototypes", "both"] = "both"
    """As for the others."""
