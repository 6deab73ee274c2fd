"""The run that is served: whether it can be served, where its adapters are kept, and which ones fit its base."""

from pathlib import Path
from typing import Any

from rayml.algorithms.inner_loop import Params
from rayml.algorithms.prototypes import is_readout
from rayml.config import Config
from rayml.errors import RunError
from rayml.lm.abilities import refuse_unable
from rayml.lm.catalog import public_name, resolve_model
from rayml.lm.lora import all_linears, linear_kinds
from rayml.lm.model import TaskLM, hooks
from rayml.lm.pooling import vector_width
from rayml.lm.sentence import SENTENCES_KEY, read_sentences
from rayml.lm.trials import matches_peft, small_copy
from rayml.runs.files import AnyPath
from rayml.runs.folder import RunFolder
from rayml.serving.adapter_files import AdapterConstraints
from rayml.serving.settings import Adapters


def read_servable_run(run: RunFolder, which: str | None = None) -> tuple[Config, AnyPath]:
    """Return the config and the checkpoint of a run, if one copy of its weights can serve all tasks.

    Raises:
        RunError: there is no such run, or it cannot be served.
    """
    config, checkpoint = run.trained(which)
    if config.mode == "full":
        raise RunError(
            f"{run.path}: mode full changes every weight for every task, and cannot be served from one copy; export "
            "it, and meta-train adapters on the folder (mode=adapters model.name=FOLDER)"
        )
    return config, checkpoint


def store_root(run: RunFolder, store: str | None) -> str:
    """Return where a run's adapters are kept: in the `store` of the settings, by default in the run's folder."""
    return store or str(run.outputs / "adapters")


def refuse_unservable(run: RunFolder, config: Config) -> None:
    """Raise ConfigError if a run's base cannot take its adapters, or has to write texts and cannot."""
    refuse_unable(resolve_model(config.model.name), config, writes=not run.has_label_tasks())


def adapter_constraints(config: Config, base: str, module: Any, limits: Adapters) -> AdapterConstraints:
    """Return what an adapter has to fit in order to be served on a run's base.

    Args:
        base: where the base was loaded from.
        module: the base's model; it may be on the meta device.
    """
    width, head = module.get_input_embeddings().embedding_dim, module.get_output_embeddings()
    sentences = getattr(module, SENTENCES_KEY, None)
    return AdapterConstraints(
        names=(config.model.name, base, public_name(base)),
        linears={name: (linear.out_features, linear.in_features) for name, linear in all_linears(module).items()},
        scale=config.lora.alpha / config.lora.rank,
        most_rank=limits.most_rank,
        most_bytes=limits.most_bytes,
        algorithm=config.algorithm,
        prompt_width=width if config.soft_tokens else 0,
        prototype_size=vector_width(sentences, module.config) + 1 if sentences else head.in_features,
        vocabulary=0 if sentences else head.out_features,
    )


def refuse_unlike_peft(folder: Path, weights: Params, config: Config, base: str, fits: AdapterConstraints) -> None:
    """Raise RunError if PEFT computes something else with an adapter's folder than what would be served.

    Both are tried on a small copy of the base, so that the base's weights need not be read.
    """
    module = None if read_sentences(base) else small_copy(base, "eager")
    if module is None:
        return
    weights = {name: weight for name, weight in weights.items() if not is_readout(name)}
    lora = {} if config.soft_tokens else {"targets": linear_kinds(module), "rank": 1, "alpha": fits.scale}
    lm = TaskLM(module, hooks(module, lora, next(iter(weights.values())).shape[0] if config.soft_tokens else 0))
    if not matches_peft(lm, weights, folder):
        raise RunError("PEFT computes something else with it than this server would: it is more than its weights")
