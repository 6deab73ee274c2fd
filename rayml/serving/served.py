"""The run that is served: whether it can be, and what fits its base."""

from pathlib import Path

from rayml.config import Config
from rayml.errors import RunError
from rayml.evaluation.session import Session
from rayml.lm.lora import all_linears
from rayml.runs.folder import RunFolder
from rayml.serving.adapter_files import Fits


def servable(run: RunFolder) -> tuple[Config, Path]:
    """Return the config and the checkpoint of a run that one copy of the weights can serve.

    Raises:
        RunError: there is none, or it cannot.
    """
    config, checkpoint = run.trained()
    if config.mode == "full":
        raise RunError(
            f"{run.path}: mode full changes every weight for every task, and cannot be served from one copy; export "
            "it, and meta-train adapters on the folder (mode=adapters model.name=FOLDER)"
        )
    return config, checkpoint


def fits_of(session: Session, most_rank: int, most_bytes: int) -> Fits:
    """Return what an adapter has to fit to be served on a run's base."""
    lora = session.config.lora
    linears = {name: (one.out_features, one.in_features) for name, one in all_linears(session.lm.module).items()}
    return Fits((session.config.model.name, session.base), linears, lora.alpha / lora.rank, most_rank, most_bytes)
