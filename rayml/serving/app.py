"""The Serve application: gateways, and behind them replicas of the model that autoscale."""

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
from rayml.runs.checkpoint import step_of
from rayml.runs.files import AnyPath, listed
from rayml.runs.folder import RunFolder
from rayml.serving.errors import ApiError
from rayml.serving.gateway import Gateway
from rayml.serving.metrics import Metrics
from rayml.serving.replica import Replica
from rayml.serving.served import refuse_unservable, servable
from rayml.serving.settings import Scaled, Serving, api_keys
from rayml.serving.store import PUBLIC, AdapterStore, every, owner_of
from rayml.serving.vllm.answerer import Answerer
from rayml.serving.vllm.engine import refuse_without_vllm, with_gpus
from rayml.training.driver import WORKER_ENV

HEALTH_SECONDS = 30.0
log = logging.getLogger(__name__)
ROUTER: Any = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class ServedReplica(Replica):
    """A replica, as Serve runs it."""

    def __init__(self, serving: Serving):
        torch.set_num_threads(max(1, int(serving.replicas.cpus or 1)))
        share = serving.replicas.gpus or 0
        if 0 < share < 1 and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(share)
        self.metrics = Metrics()
        super().__init__(serving, self.metrics.observe)

    async def check_health(self) -> None:
        self.metrics.show_again()
        await self.check(HEALTH_SECONDS)

    # Refusals go back as values: Serve writes what is raised into its log, and their messages quote the client.

    async def learn(self, *request: Any) -> Any:
        return await refused_or(super().learn(*request))

    async def begin(self, *request: Any) -> Any:
        return await refused_or(super().begin(*request))

    async def classify(self, *request: Any) -> Any:
        return await refused_or(super().classify(*request))

    async def write(self, *request: Any) -> AsyncIterator[Any]:
        try:
            async for written in super().write(*request):
                yield written
        except ApiError as refusal:
            yield refusal


class ServedAnswerer(Answerer):
    """A replica of vLLM, as Serve runs it."""

    def __init__(self, serving: Serving, name: str):
        self.metrics = Metrics()
        super().__init__(serving, name, self.metrics.observe)

    async def check_health(self) -> None:
        self.metrics.show_again()
        await self.check_engine()

    async def classify(self, *request: Any) -> Any:
        try:
            return await super().classify(*request)
        except Exception as error:
            return self._refusal(error)

    async def respond(self, *request: Any) -> AsyncIterator[Any]:
        try:
            async for told in super().respond(*request):
                yield told
        except Exception as error:
            yield self._refusal(error)

    def _refusal(self, error: Exception) -> ApiError:
        """Return what goes back as a value; where the engine is gone, another replica has to answer."""
        if self.engine.errored:
            return ApiError(503, "the engine was lost; send the request again", code="replica_lost")
        if isinstance(error, ApiError):
            return error
        raise error

    def __del__(self) -> None:
        if hasattr(self, "versions"):  # it was opened
            self.close()


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
    if args.engine == "vllm":
        refuse_without_vllm(config, resolve_model(config.model.name))
        args = with_gpus(args, ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0)
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
    model = deployed("Model", ServedReplica, replicas).bind(serving)
    answerers = deployed("Answerer", ServedAnswerer, args.answerers).bind(serving, base)
    gateway = serve.deployment(
        name="Gateway",
        num_replicas=replicas.gateways,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": WORKER_ENV}},
        max_ongoing_requests=10_000,
        max_queued_requests=10_000,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=args.limits.retry_after_seconds),
        graceful_shutdown_timeout_s=replicas.drain_seconds,
    )(Gateway)
    # The cluster's state keeps no key.
    settle_owners(AdapterStore(store), keys)
    digests = {hashlib.sha256(key.encode()).hexdigest(): owner for key, owner in keys.items()}
    answerer = answerers if args.engine == "vllm" else None
    return gateway.bind(model, serving, base, fingerprint, store, digests, answerer)


def settle_owners(store: AdapterStore, keys: Mapping[str, str]) -> None:
    """Give a key's adapters to the name that it has got since; say whose adapters no key sees."""
    for key, owner in keys.items():
        if owner != owner_of(key):
            for manifest in every(store, owner_of(key)):
                store.move(owner_of(key), manifest.id, owner)
    if keys and PUBLIC not in keys.values() and store.count(PUBLIC):
        gives = f"`rayml store move {store.root} {PUBLIC} NAME` gives them to one"
        log.warning("%d adapters were made without a key, and no key sees them; %s", store.count(PUBLIC), gives)


def deployed(name: str, kind: type, scaled: Scaled) -> Any:
    """Return the deployment of a kind of replicas."""
    return serve.deployment(
        name=name,
        ray_actor_options=resources(scaled),
        max_ongoing_requests=scaled.ongoing_requests,
        max_queued_requests=scaled.queued_requests,
        graceful_shutdown_timeout_s=scaled.drain_seconds,
        health_check_timeout_s=2 * HEALTH_SECONDS,
        # An adapter's requests go to one replica, so that others need not load it; to the next, when that one is full.
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        **scaling(scaled),
    )(kind)


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


def sums(checkpoint: AnyPath) -> list[str]:
    """Return what tells one checkpoint from another: the manifests of its parts, with their checksums."""
    return [path.read_text() for path in listed(checkpoint, "manifest_*.json")]
