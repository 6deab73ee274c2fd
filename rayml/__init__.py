"""rayml meta-trains causal language models on Ray, so that they learn a new task from a handful of examples.

    import rayml

    model = rayml.load("runs/quickstart")
    tickets = model.adapt([("I was charged twice", "billing"), ("the app crashes", "bug")])
    tickets.predict("my parcel is late")

`rayml/README.md` lists all that is here. Names are imported when they are first used, so `import rayml` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rayml.adapter import Adapter, Prediction, load_adapter
    from rayml.api import SweepResult, compare, evaluate, sweep, train
    from rayml.config import Config, load_config
    from rayml.errors import ConfigError, DataError, RaymlError, RunError, StorageError, TrainingError
    from rayml.model import MetaModel, load
    from rayml.starts.choice import Choice, choose_start

__all__ = [
    "Adapter",
    "Choice",
    "Config",
    "ConfigError",
    "DataError",
    "MetaModel",
    "Prediction",
    "RaymlError",
    "RunError",
    "StorageError",
    "SweepResult",
    "TrainingError",
    "__version__",
    "choose_start",
    "compare",
    "evaluate",
    "load",
    "load_adapter",
    "load_config",
    "sweep",
    "train",
]
_HOMES = {
    "adapter": ("Adapter", "Prediction", "load_adapter"),
    "api": ("SweepResult", "compare", "evaluate", "sweep", "train"),
    "config": ("Config", "load_config"),
    "errors": ("ConfigError", "DataError", "RaymlError", "RunError", "StorageError", "TrainingError"),
    "model": ("MetaModel", "load"),
    "starts.choice": ("Choice", "choose_start"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'rayml' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"rayml.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
