"""The algorithms by name. Each maps (support losses, query losses, start, rates, steps, weights) to a MetaGradient."""

from rayml.meta.fomaml import fomaml
from rayml.meta.maml import maml
from rayml.meta.multitask import as_it_stands, multitask
from rayml.meta.reptile import reptile

ALGORITHMS = {
    "fomaml": fomaml,
    "meta_sgd": fomaml,
    "maml": maml,
    "reptile": reptile,
    "multitask": multitask,
    "metaicl": as_it_stands,
    "protonet": as_it_stands,
}
