"""Metrics for Prometheus, through Ray's API. Ray adds the labels `application`, `deployment` and `replica`."""

from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

SECONDS: list[float] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
ROWS: list[float] = [1, 2, 4, 8, 16, 32, 64, 128]
COUNTERS = {
    "loads": "Adapters read from the store",
    "evictions": "Adapters that made room for others",
    "refused": "Adapters in the store that do not fit, or cannot be trusted",
    "adaptations": "Adapters learned",
}
GAUGES = {"cached_adapters": "Adapters in memory", "cached_bytes": "Bytes of the adapters in memory"}
HISTOGRAMS: dict[str, tuple[str, list[float]]] = {
    "classify_batch": ("Queries classified in one forward", ROWS),
    "decode_batch": ("Texts written side by side in one forward", ROWS),
    "adaptation_batch": ("Adapters learned in one inner loop", ROWS),
    "adaptation_seconds": ("From the examples to a published adapter", SECONDS),
}


class Metrics:
    """Counters, gauges and histograms. All their names begin with `rayml_`."""

    def __init__(self) -> None:
        self._counters = {name: Counter(f"rayml_{name}_total", text) for name, text in COUNTERS.items()}
        self._gauges = {name: Gauge(f"rayml_{name}", text) for name, text in GAUGES.items()}
        self._gauge_values: dict[str, float] = {}
        self._histograms = {
            name: Histogram(f"rayml_{name}", text, boundaries=bounds) for name, (text, bounds) in HISTOGRAMS.items()
        }
        tags: Any = ("route", "method", "status")
        self._requests = Counter("rayml_requests_total", "Requests answered", tag_keys=tags)
        self._latency = Histogram(
            "rayml_request_seconds", "To the answer's first byte", boundaries=SECONDS, tag_keys=("route",)
        )

    def observe(self, name: str, value: float) -> None:
        if name in self._counters:
            self._counters[name].inc(value)
        elif name in self._gauges:
            self._gauge_values[name] = value
            self._gauges[name].set(value)
        else:
            self._histograms[name].observe(value)

    def refresh_gauges(self) -> None:
        """Set the gauges to their values again: Ray drops those that were not set for some seconds."""
        for name, value in self._gauge_values.items():
            self._gauges[name].set(value)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.inc(1, tags={"route": route, "method": method, "status": str(status)})
        self._latency.observe(seconds, tags={"route": route})
