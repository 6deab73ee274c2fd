"""What `rayml compare` knows by name: how each method differs from the config, and what it starts from. Data alone."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    overrides: tuple[str, ...]
    start: str = "trained"
    """`trained`; `untrained`: where training would begin; `base`: no adapter at all."""
    takes_support: bool = True
    labels_only: bool = False
    """It is left out where there is free text, unless it is asked for."""


# They never adapt: where adapters begin is not worth looking at data for.
IN_CONTEXT = ("algorithm.name=metaicl", "data.labels=words", "lora.start=random", "adapter=lora")
# Fine-tuning of the model's own weights, in place of adapters; its rates are others.
FINE_TUNED = "mode=full", "engine=local", "algorithm.name=fomaml_plus", "adapter=lora", "inner.lr=0.03"
METHODS = {
    "zero_shot": Method(IN_CONTEXT, "base", takes_support=False),
    "in_context": Method(IN_CONTEXT, "base"),
    "lora": Method(("algorithm.name=fomaml_plus",), "untrained"),
    "full": Method(FINE_TUNED, "untrained"),
    "top_layers": Method((*FINE_TUNED, "full.last_layers=2", "full.embeddings=false"), "untrained"),
    "gradual": Method((*FINE_TUNED, "inner.unfreeze_every=1"), "untrained"),
    "discriminative": Method((*FINE_TUNED, "inner.layer_decay=0.9"), "untrained"),
    "multitask": Method(("algorithm.name=multitask",)),
    "protonet": Method(("algorithm.name=protonet",), labels_only=True),
    "metaicl": Method(("algorithm.name=metaicl",)),
    "reptile": Method(("algorithm.name=reptile",)),
    "fomaml": Method(("algorithm.name=fomaml",)),
    "fomaml_plus": Method(("algorithm.name=fomaml_plus",)),
    "proto_maml": Method(("algorithm.name=proto_maml",)),
    "meta_sgd": Method(("algorithm.name=meta_sgd",)),
    "anil": Method(("algorithm.name=fomaml_plus", "inner.modules=['*.lora_B']")),
    "maml": Method(("algorithm.name=maml", "model.attention=eager")),
}
UNUSUAL = "anil", "maml", "full", "top_layers", "gradual", "discriminative"
USUAL = tuple(name for name in METHODS if name not in UNUSUAL)
BASELINE = "multitask"
"""What differences are to."""
BUDGET = "fomaml_plus"
"""The algorithm whose tokens, in the config's outer steps, everyone may have."""
