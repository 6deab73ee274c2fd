"""Keys that algorithms took over, and run folders from before they did."""

from typing import Any

MOVED = {
    "outer.start_weight": "is a setting of the algorithm: algorithm.start_weight (fomaml_plus, meta_sgd)",
    "inner.learn_lr": "is a setting of the algorithm: algorithm.learn_rates (fomaml_plus, maml); fomaml's are fixed",
}


def modernized(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a run's `config.yaml` as they are written now.

    Until algorithms had settings of their own, `fomaml` was what `fomaml_plus` is, and the two keys in MOVED stood in
    every run's file, whatever its algorithm.
    """
    inner, outer = dict(values.get("inner") or {}), dict(values.get("outer") or {})
    if "learn_lr" not in inner and "start_weight" not in outer:
        return values
    learn_rates, start_weight = inner.pop("learn_lr", True), outer.pop("start_weight", 1.0)
    name = (values.get("algorithm") or {}).get("name", "fomaml")
    algorithm = {
        "fomaml": {"name": "fomaml_plus", "learn_rates": learn_rates, "start_weight": start_weight},
        "meta_sgd": {"name": "meta_sgd", "start_weight": start_weight},
        "maml": {"name": "maml", "learn_rates": learn_rates},
    }.get(name, {"name": name})
    return values | {"inner": inner, "outer": outer, "algorithm": algorithm}
