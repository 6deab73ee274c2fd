"""The run that is served: whether it can be, and what fits its base."""

from typing import Any

from rayml.config import Config
from rayml.errors import RunError
from rayml.lm.lora import all_linears
from rayml.runs.files import AnyPath
from rayml.runs.folder import RunFolder
from rayml.serving.adapter_files import Fits
from rayml.serving.settings import Adapters


def servable(run: RunFolder, which: str | None = None) -> tuple[Config, AnyPath]:
    """Return the config and the checkpoint of a run that one copy of the weights can serve.

    Raises:
        RunError: there is none, or it cannot.
    """
    config, checkpoint = run.trained(which)
    if config.mode == "full":
        raise RunError(
            f"{run.path}: mode full changes every weight for every task, and cannot be served from one copy; export "
            "it, and meta-train adapters on the folder (mode=adapters model.name=FOLDER)"
        )
    return config, checkpoint


def fits_of(config: Config, base: str, module: Any, limits: Adapters) -> Fits:
    """Return what an adapter has to fit to be served on a run's base.

    Args:
        base: where the base was loaded from.
        module: its model; on the meta device will do.
    """
    linears = {name: (one.out_features, one.in_features) for name, one in all_linears(module).items()}
    scale = config.lora.alpha / config.lora.rank
    width, head = module.get_input_embeddings().embedding_dim, module.get_output_embeddings()
    return Fits(
        (config.model.name, base),
        linears,
        scale,
        limits.most_rank,
        limits.most_bytes,
        config.algorithm,
        prompt_width=width if config.soft_tokens else 0,
        hidden_size=head.in_features,
        vocabulary=head.out_features,
    )
