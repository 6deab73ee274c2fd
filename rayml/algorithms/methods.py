"""The methods that `rayml compare` knows by name: how each differs from the config, and what it starts from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    overrides: tuple[str, ...]
    start: str = "trained"
    """`trained`; `untrained`: where training would begin; `base`: no adapter at all; `encoder`: no language model, but
    a classifier (`rayml.experiments.classifiers`)."""
    has_seeds: bool = True
    """Whether anything depends on the seed."""
    takes_support: bool = True
    by_prompt: bool = False
    """Whether it answers by what the prompt shows, which a sentence encoder cannot do."""
    labels_only: bool = False
    """Whether it cannot learn free text. Then it is left out if there is any, unless it is named."""


# These never adapt, so it is not worth computing a start from data.
IN_CONTEXT = ("algorithm.name=metaicl", "data.labels=words", "lora.start=random", "adapter=lora")
# These fine-tune the model's own weights instead of adapters, which takes another rate.
FINE_TUNED = "mode=full", "engine=local", "algorithm.name=fomaml_plus", "adapter=lora", "inner.lr=0.03"
METHODS = {
    "zero_shot": Method(IN_CONTEXT, "base", has_seeds=False, takes_support=False, by_prompt=True),
    "in_context": Method(IN_CONTEXT, "base", has_seeds=False, by_prompt=True),
    "embedding": Method((), "encoder", has_seeds=False, labels_only=True),
    "setfit": Method((), "encoder", labels_only=True),
    "lora": Method(("algorithm.name=fomaml_plus",), "untrained"),
    "full": Method(FINE_TUNED, "untrained"),
    "top_layers": Method((*FINE_TUNED, "full.last_layers=2", "full.embeddings=false"), "untrained"),
    "gradual": Method((*FINE_TUNED, "inner.unfreeze_every=1"), "untrained"),
    "discriminative": Method((*FINE_TUNED, "inner.layer_decay=0.9"), "untrained"),
    "multitask": Method(("algorithm.name=multitask",)),
    "protonet": Method(("algorithm.name=protonet",), labels_only=True),
    "metaicl": Method(("algorithm.name=metaicl",), by_prompt=True),
    "reptile": Method(("algorithm.name=reptile",)),
    "fomaml": Method(("algorithm.name=fomaml",)),
    "fomaml_plus": Method(("algorithm.name=fomaml_plus",)),
    "proto_maml": Method(("algorithm.name=proto_maml",)),
    "meta_sgd": Method(("algorithm.name=meta_sgd",)),
    "anil": Method(("algorithm.name=fomaml_plus", "inner.modules=['*.lora_B']")),
    "maml": Method(("algorithm.name=maml", "model.attention=eager")),
}
NOT_RUN = {
    "fastfit": "fast-fit 1.2.1, the newest, needs datasets below 3 and transformers below 5; take setfit or embedding"
}
"""Methods that are known but refused, and why."""
UNUSUAL = "setfit", "anil", "maml", "full", "top_layers", "gradual", "discriminative"
USUAL = tuple(name for name in METHODS if name not in UNUSUAL)
BASELINE = "multitask"
"""The method that the others are compared with."""
BUDGET = "fomaml_plus"
"""The algorithm whose number of tokens, in the config's outer steps, every method may use."""
