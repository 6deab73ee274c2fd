"""The Serve application: gateways, and behind them replicas of the model that autoscale."""

import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig

from rayml.config import dump_config
from rayml.runs.checkpoint import step_of
from rayml.runs.files import AnyPath, listed
from rayml.runs.folder import RunFolder
from rayml.serving.errors import ApiError
from rayml.serving.gateway import Gateway
from rayml.serving.metrics import Metrics
from rayml.serving.replica import Replica
from rayml.serving.served import refuse_unservable, servable
from rayml.serving.settings import Replicas, Serving, api_keys
from rayml.serving.store import AdapterStore
from rayml.training.driver import WORKER_ENV

HEALTH_SECONDS = 30.0
log = logging.getLogger(__name__)
ROUTER: Any = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class ServedReplica(Replica):
    """A replica, as Serve runs it."""

    def __init__(self, serving: Serving):
        torch.set_num_threads(max(1, int(serving.replicas.cpus or 1)))
        super().__init__(serving, Metrics().observe)

    async def check_health(self) -> None:
        await self.check(HEALTH_SECONDS)

    # Refusals go back as values: Serve writes what is raised into its log, and their messages quote the client.

    async def learn(self, *request: Any) -> Any:
        return await refused_or(super().learn(*request))

    async def classify(self, *request: Any) -> Any:
        return await refused_or(super().classify(*request))

    async def write(self, *request: Any) -> AsyncIterator[Any]:
        try:
            async for written in super().write(*request):
                yield written
        except ApiError as refusal:
            yield refusal


async def refused_or(answer: Awaitable[Any]) -> Any:
    try:
        return await answer
    except ApiError as refusal:
        return refusal


def build(args: Serving) -> serve.Application:
    """Return the application; `serve run serve.app:app run=RUN` and `rayml serve RUN` both come here.

    Raises:
        ConfigError, RunError: the run cannot be served, or the store or the keys cannot be used.
    """
    run = RunFolder(args.run)
    config, checkpoint = servable(run, args.checkpoint)
    refuse_unservable(run, config)
    store = args.store or str(run.outputs / "adapters")
    store = store if "://" in store else str(Path(store).absolute())
    serving = args.model_copy(update={"run": run.start or str(run.path), "store": store})
    AdapterStore(store)
    keys = api_keys(args.keys_file)
    if not keys:
        log.warning("no API key is set: whoever reaches the port may use this server")
    content = [str(step_of(checkpoint)), dump_config(config), *sums(checkpoint)]
    fingerprint = hashlib.sha256("\n".join(content).encode()).hexdigest()
    base = args.name or config.model.name.rstrip("/").rsplit("/", 1)[-1]
    replicas = args.replicas
    model = serve.deployment(
        name="Model",
        ray_actor_options=resources(replicas),
        max_ongoing_requests=replicas.ongoing_requests,
        max_queued_requests=replicas.queued_requests,
        graceful_shutdown_timeout_s=replicas.drain_seconds,
        health_check_timeout_s=2 * HEALTH_SECONDS,
        # An adapter's requests go to one replica, so that others need not load it; to the next, when that one is full.
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        **scaling(replicas),
    )(ServedReplica)
    gateway = serve.deployment(
        name="Gateway",
        num_replicas=replicas.gateways,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": WORKER_ENV}},
        max_ongoing_requests=10_000,
        max_queued_requests=10_000,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=args.limits.retry_after_seconds),
        graceful_shutdown_timeout_s=replicas.drain_seconds,
    )(Gateway)
    digests = frozenset(hashlib.sha256(key.encode()).hexdigest() for key in keys)  # the cluster's state keeps no key
    return gateway.bind(model.bind(serving), serving, base, fingerprint, store, digests)


def resources(replicas: Replicas) -> dict[str, Any]:
    gpus = replicas.gpus
    if gpus is None:
        gpus = 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) else 0.0
    return {"num_cpus": replicas.cpus or 1, "num_gpus": gpus, "runtime_env": {"env_vars": WORKER_ENV}}


def scaling(replicas: Replicas) -> dict[str, Any]:
    if replicas.min >= replicas.max:
        return {"num_replicas": replicas.min}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.max,
            target_ongoing_requests=replicas.target_ongoing_requests,
            upscale_delay_s=replicas.upscale_delay_seconds,
            downscale_delay_s=replicas.downscale_delay_seconds,
        )
    }


def sums(checkpoint: AnyPath) -> list[str]:
    """Return what tells one checkpoint from another: the manifests of its parts, with their checksums."""
    return [path.read_text() for path in listed(checkpoint, "manifest_*.json")]
