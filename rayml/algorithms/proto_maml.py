"""Proto-MAML (Triantafillou et al. 2020, arXiv 1903.03096) for language models, by first order.

Inner steps descend the losses of label tokens and of leave-one-out prototypes. Queries are answered by a learned mix of
both at the adapted weights (`rayml.algorithms.prototypes`), and the start is learned from these answers. This costs one
more forward and backward of the support. With one example of a class nothing can be left out, so inner steps descend
the label tokens' loss alone. Free text is learned as by `fomaml_plus`.
"""

from typing import Literal

from rayml.algorithms.fomaml import FomamlPlus


class ProtoMaml(FomamlPlus):
    """First-order MAML with learned rates that reads prototypes and label tokens together."""

    readout: Literal["labels", "prototypes", "both"] = "both"
    """As for the other algorithms."""
