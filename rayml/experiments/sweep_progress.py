"""The trials of a sweep on the terminal, as they go; a line an event where there is none."""

from typing import Any

import ray.tune
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table


class TrialTable(ray.tune.Callback):
    """Follows the trials: plain data, since Ray Tune pickles it; the terminal is taken anew in every process."""

    def __init__(self, keys: list[str], steps: int):
        self.keys, self.steps = keys, steps
        self.rows: dict[str, dict[str, Any]] = {}
        self.live: Live | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"live": None}

    def get_state(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def set_state(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]

    def setup(self, *_: Any, **__: Any) -> None:
        self.live = Live(console=Console(stderr=True, markup=False), refresh_per_second=2)
        if self.live.console.is_terminal:
            self.live.start()

    def on_trial_start(self, iteration, trials, trial, **_) -> None:
        self._show(trial, "running")

    def on_trial_result(self, iteration, trials, trial, result, **_) -> None:
        self._show(trial, "running", result)

    def on_trial_complete(self, iteration, trials, trial, **_) -> None:
        result = trial.last_result or {}
        self._show(trial, "finished" if result.get("step", 0) >= self.steps else "stopped", result)

    def on_trial_error(self, iteration, trials, trial, **_) -> None:
        self._show(trial, "failed", trial.last_result)

    def on_experiment_end(self, trials, **_) -> None:
        if self.live and self.live.is_started:
            self.live.stop()

    def _show(self, trial: Any, state: str, result: dict[str, Any] | None = None) -> None:
        row = self.rows.setdefault(trial.trial_id, {"point": trial.config, "result": {}})
        row |= {"state": state, "result": result or row["result"]}
        if self.live and self.live.is_started:
            self.live.update(self.table())
        elif self.live:
            cells = self._cells(list(self.rows).index(trial.trial_id) + 1, row)
            self.live.console.print("  ".join(cells), highlight=False, soft_wrap=True)

    def table(self) -> Table:
        found = Table(box=SIMPLE_HEAD, title="sweep", title_justify="left", padding=(0, 1, 0, 0))
        for name in ("trial", *self.keys, "step", "before", "after", "state"):
            found.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
        for number, row in enumerate(self.rows.values(), start=1):
            found.add_row(*self._cells(number, row))
        return found

    def _cells(self, number: int, row: dict[str, Any]) -> list[str]:
        result = row["result"]
        point = [shown(row["point"][key]) for key in self.keys]
        scores = [f"{result[name]:.3f}" if name in result else "-" for name in ("before", "after")]
        return [str(number), *point, f"{result.get('step', 0)}/{self.steps}", *scores, row["state"]]


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
