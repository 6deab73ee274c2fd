"""The Serve application: gateways, and behind them autoscaling replicas of the model."""

import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig

from rayml.config import dump_config
from rayml.lm.catalog import resolve_model
from rayml.ray_start import WORKER_ENV
from rayml.runs.checkpoint import step_of
from rayml.runs.files import list_matching
from rayml.runs.folder import RunFolder
from rayml.serving.errors import ApiError
from rayml.serving.gateway import Gateway
from rayml.serving.metrics import Metrics
from rayml.serving.replica import Replica
from rayml.serving.served import read_servable_run, refuse_unservable, store_root
from rayml.serving.settings import Scaled, Serving, api_keys
from rayml.serving.store import PUBLIC, AdapterStore, DamagedError, all_manifests, owner_of
from rayml.serving.vllm.answerer import Answerer
from rayml.serving.vllm.engine import refuse_without_vllm, with_gpus

HEALTH_SECONDS = 30.0
log = logging.getLogger(__name__)
ROUTER: Any = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class ServedReplica(Replica):
    """A replica as Ray Serve runs it."""

    def __init__(self, serving: Serving):
        torch.set_num_threads(max(1, int(serving.replicas.cpus or 1)))
        gpus = serving.replicas.gpus or 0
        if 0 < gpus < 1 and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(gpus)
        self.metrics = Metrics()
        super().__init__(serving, self.metrics.observe)

    async def check_health(self) -> None:
        self.metrics.refresh_gauges()
        await self.check(HEALTH_SECONDS)

    # Refusals are returned, not raised: Serve logs every exception, and their messages quote the client's texts.

    async def learn(self, *args: Any) -> Any:
        return await result_or_refusal(super().learn(*args))

    async def begin(self, *args: Any) -> Any:
        return await result_or_refusal(super().begin(*args))

    async def classify(self, *args: Any) -> Any:
        return await result_or_refusal(super().classify(*args))

    async def write(self, *args: Any) -> AsyncIterator[Any]:
        try:
            async for piece in super().write(*args):
                yield piece
        except ApiError as refusal:
            yield refusal


async def result_or_refusal(result: Awaitable[Any]) -> Any:
    try:
        return await result
    except ApiError as refusal:
        return refusal


class ServedAnswerer(Answerer):
    """A replica of vLLM as Ray Serve runs it."""

    def __init__(self, serving: Serving, name: str):
        self.metrics = Metrics()
        super().__init__(serving, name, self.metrics.observe)

    async def check_health(self) -> None:
        self.metrics.refresh_gauges()
        await self.check_engine()

    async def classify(self, *args: Any) -> Any:
        try:
            return await super().classify(*args)
        except Exception as error:
            return self._refusal(error)

    async def respond(self, *args: Any) -> AsyncIterator[Any]:
        try:
            async for item in super().respond(*args):
                yield item
        except Exception as error:
            yield self._refusal(error)

    def _refusal(self, error: Exception) -> ApiError:
        """Return an error as a refusal, or raise it. If the engine is gone, another replica has to answer."""
        if self.engine.errored:
            return ApiError(503, "the engine was lost; send the request again", code="replica_lost")
        if isinstance(error, ApiError):
            return error
        raise error

    def __del__(self) -> None:
        if hasattr(self, "versions"):  # the engine was opened
            self.close()


def build(args: Serving) -> serve.Application:
    """Return the application, for both `serve run serve.app:app run=RUN` and `rayml serve RUN`.

    Raises:
        ConfigError, RunError: the run cannot be served, or the store or the keys cannot be used.
    """
    run = RunFolder(args.run)
    config, checkpoint = read_servable_run(run, args.checkpoint)
    refuse_unservable(run, config)
    if args.engine == "vllm":
        refuse_without_vllm(config, resolve_model(config.model.name))
        args = with_gpus(args, ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0)
    root = store_root(run, args.store)
    root = root if "://" in root else str(Path(root).absolute())
    store = AdapterStore(root)
    serving = args.model_copy(update={"run": run.start or str(run.path), "store": root})
    keys = api_keys(args.keys_file)
    if not keys:
        log.warning("no API key is set: anyone who reaches the port may use this server")
    manifests = [path.read_text() for path in list_matching(checkpoint, "manifest_*.json")]  # with the parts' checksums
    content = [str(step_of(checkpoint)), dump_config(config), *manifests]
    fingerprint = hashlib.sha256("\n".join(content).encode()).hexdigest()
    base = args.name or config.model.name.rstrip("/").rsplit("/", 1)[-1]
    model = deployment("Model", ServedReplica, args.replicas).bind(serving)
    answerers = None
    if args.engine == "vllm":
        answerers = deployment("Answerer", ServedAnswerer, args.answerers).bind(serving, base)
    gateway = serve.deployment(
        name="Gateway",
        num_replicas=args.replicas.gateways,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": WORKER_ENV}},
        max_ongoing_requests=10_000,
        max_queued_requests=10_000,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=args.limits.retry_after_seconds),
        graceful_shutdown_timeout_s=args.replicas.drain_seconds,
    )(Gateway)
    settle_owners(store, keys)
    # The cluster's state holds the arguments, so the gateway gets no key, only digests.
    owners = {hashlib.sha256(key.encode()).hexdigest(): owner for key, owner in keys.items()}
    return gateway.bind(model, serving, base, fingerprint, root, owners, answerers)


def settle_owners(store: AdapterStore, keys: Mapping[str, str]) -> None:
    """Move the adapters of a key that has a name now to that name. Warn if there are adapters that no key sees."""
    for key, owner in keys.items():
        if owner != owner_of(key):
            for manifest in all_manifests(store, owner_of(key)):
                try:
                    store.move(owner_of(key), manifest.id, owner)
                except DamagedError as error:  # it stays where it is, and the others are served
                    log.error("adapter %s cannot be moved to %s: %s", manifest.id, owner, error)
    if keys and PUBLIC not in keys.values() and store.count(PUBLIC):
        advice = f"`rayml store move {store.root} {PUBLIC} NAME` gives them to one"
        log.warning("%d adapters were made without a key, and no key sees them; %s", store.count(PUBLIC), advice)


def deployment(name: str, replica_class: type, scaled: Scaled) -> Any:
    return serve.deployment(
        name=name,
        ray_actor_options=resources(scaled),
        max_ongoing_requests=scaled.ongoing_requests,
        max_queued_requests=scaled.queued_requests,
        graceful_shutdown_timeout_s=scaled.drain_seconds,
        health_check_timeout_s=2 * HEALTH_SECONDS,
        # An adapter's requests go to one replica, so that no other has to load it; if it is full, to the next one.
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        **scaling(scaled),
    )(replica_class)


def resources(replicas: Scaled) -> dict[str, Any]:
    gpus = replicas.gpus
    if gpus is None:
        gpus = 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) else 0.0
    return {"num_cpus": replicas.cpus or 1, "num_gpus": gpus, "runtime_env": {"env_vars": WORKER_ENV}}


def scaling(replicas: Scaled) -> dict[str, Any]:
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
