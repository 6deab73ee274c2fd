"""The commands `rayml serve` and `rayml publish`."""

import json
import logging
import math
import os
import re
import signal
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from rich.console import Console

from rayml.config import parse_section
from rayml.errors import ConfigError, RunError
from rayml.lm.catalog import resolve_model
from rayml.lm.load import load_shape
from rayml.lm.precision import own_device, resolve_precision_here
from rayml.overrides import refuse_duplicates
from rayml.progress import show_activity
from rayml.ray_start import WORKER_ENV, processors, slow_log_monitor
from rayml.runs.folder import RunFolder
from rayml.serving.adapter_files import FILES, read_adapter
from rayml.serving.app import build
from rayml.serving.ports import end_orphans, mark_session, refuse_taken
from rayml.serving.served import (
    adapter_constraints,
    read_servable_run,
    refuse_unlike_peft,
    refuse_unservable,
    store_root,
)
from rayml.serving.settings import Adapters, Scaled, Serving, api_keys, check_host
from rayml.serving.store import NAME, AdapterStore, Manifest, adapter_id, owner_of
from rayml.serving.vllm.engine import refuse_without_vllm
from rayml.training.ray_internals import listen_on_localhost

APPLICATION = "rayml"
EXAMPLE = {
    "examples": [{"input": "I was charged twice", "target": "billing"}, {"input": "It crashes", "target": "bug"}]
}


def serve_forever(
    run: str,
    overrides: Sequence[str],
    host: str,
    port: int,
    store: str | None,
    keys_file: Path | None,
    metrics_port: int | None,
    insecure: bool,
    checkpoint: str | None,
    out: Console,
) -> None:
    """Serve until Ctrl-C or SIGTERM, and then finish the requests that have begun.

    Raises:
        ConfigError, RunError: settings that do not work, a run that cannot be served, or a host without keys.
    """
    values: dict[str, Any] = {"run": run, "store": store, "keys_file": str(keys_file) if keys_file else None}
    values |= {"checkpoint": checkpoint} if checkpoint else {}
    serving = parse_section(Serving, values, "rayml serve", refuse_duplicates(overrides))
    keys = api_keys(serving.keys_file)
    check_host(host, keys, insecure)
    folder = RunFolder(run)
    config, served_checkpoint = read_servable_run(folder, serving.checkpoint)
    refuse_unservable(folder, config)
    if serving.engine == "vllm":
        refuse_without_vllm(config, resolve_model(config.model.name))
    err = Console(stderr=True, markup=False)
    is_own_ray = not os.environ.get("RAY_ADDRESS")
    if is_own_ray:
        serving = with_cpus(serving, processors())
        end_orphans()
        refuse_taken(host, {"--port": port})
        refuse_taken("0.0.0.0", {"--metrics-port": metrics_port})
    with show_activity(err, "starting Ray"):
        start_cluster(serving, metrics_port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it at once until it serves, as Ctrl-C does
    try:
        began = time.perf_counter()
        application = build(serving)
        serve.start(http_options={"host": host, "port": port})
        host, port = server_address()
        check_host(host, keys, insecure)
        with show_activity(err, "loading the model in its replicas"):
            serve.run(application, name=APPLICATION, route_prefix="/", logging_config={"encoding": "JSON"})
        url = f"http://{host}:{port}"
        out.print(f"serving {run} at {url} ({time.perf_counter() - began:.0f} s to start; {url}/docs shows the API)")
        out.print(f"it serves {folder.describe_checkpoint(served_checkpoint)}", style="dim", highlight=False)
        if is_own_ray:  # the replicas are on this machine
            base, device = resolve_model(config.model.name), own_device(config)
            precision = resolve_precision_here(config, base, device, folder.trained_dtype())[1]
            out.print(f"in {precision}", style="dim", highlight=False, markup=False)
        out.print("teach it a task:", style="dim")
        key = ' -H "Authorization: Bearer $KEY"' if keys else ""
        out.print(f"  curl {url}/v1/adapters{key} -d '{json.dumps(EXAMPLE)}'", markup=False, soft_wrap=True)
        out.print("Ctrl-C stops it.", style="dim")
        wait_for_signal()
        out.print("finishing the requests that have begun ...", style="dim")
        serve.delete(APPLICATION)  # lets the replicas finish; a shutdown alone would cut them off
    except KeyboardInterrupt:
        out.print("stopped before it served", style="dim")
        if not is_own_ray:
            serve.delete(APPLICATION)
    finally:
        ray.shutdown()  # ends a Ray of our own; on a cluster, Serve and the applications of others go on


def wait_for_signal() -> None:
    """Return at Ctrl-C or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()


def server_address() -> tuple[str, int]:
    """Return where Serve listens. If it ran before, it keeps its address, whatever it was given just now."""
    client = _get_global_client()
    assert client is not None
    return client.http_config.host or "127.0.0.1", client.http_config.port


def replica_settings(serving: Serving) -> dict[str, Scaled]:
    """Return the settings of each kind of replica that runs a model, by their name in `Serving`."""
    return {"replicas": serving.replicas} | ({"answerers": serving.answerers} if serving.engine == "vllm" else {})


def most_replicas(scaled: Scaled) -> int:
    return max(scaled.min, scaled.max)


def with_cpus(serving: Serving, processors: int) -> Serving:
    """Return the settings with an equal share of a machine's processors for every replica, where `cpus` is not set."""
    kinds = replica_settings(serving)
    share = max(1, processors // sum(map(most_replicas, kinds.values())))
    changes = {name: scaled.model_copy(update={"cpus": scaled.cpus or share}) for name, scaled in kinds.items()}
    return serving.model_copy(update=changes)


def start_cluster(serving: Serving, metrics_port: int | None) -> None:
    """Start Ray here, with room for all replicas, or join the cluster that RAY_ADDRESS names."""
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    common["runtime_env"] = {"env_vars": WORKER_ENV}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**common)
        return
    needed = sum(most_replicas(scaled) * (scaled.cpus or 1) for scaled in replica_settings(serving).values())
    cpus = max(processors(), math.ceil(needed))
    metrics: dict[str, Any] = {"_metrics_export_port": metrics_port} if metrics_port else {}
    slow_log_monitor()
    # On a busy machine a proxy takes longer to start than the 5 s after which Serve would kill it.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    with listen_on_localhost():
        context: Any = ray.init("local", num_cpus=cpus, include_dashboard=False, **metrics, **common)
    mark_session(Path(context.address_info["session_dir"]))


def publish_adapter(
    source: Path, run_path: str, name: str | None, store: str | None, out: Console, owner: str | None = None
) -> None:
    """Check an adapter's folder, or a zip of it, against a run's base, and put it into a server's store.

    Raises:
        RunError, ConfigError: it does not fit, or cannot be read; or the name is not allowed.
    """
    run = RunFolder(run_path)
    config, _ = run.trained()
    name = name or re.sub(r"[^A-Za-z0-9_-]", "-", source.name if source.is_dir() else source.stem)
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r}: letters, digits, - and _, at most 64, beginning with a letter or digit")
    base = resolve_model(config.model.name)
    fits = adapter_constraints(config, base, load_shape(base), Adapters())
    with tempfile.TemporaryDirectory() as folder:
        copy_files(source, Path(folder))
        try:
            weights, card = read_adapter(Path(folder), fits)
            refuse_unlike_peft(Path(folder), weights, config, base, fits)
        except RunError as error:
            raise RunError(f"{source}: {error}") from error
        content = [path.read_bytes().hex() for path in (Path(folder) / file for file in FILES) if path.exists()]
        manifest = Manifest(id=adapter_id(name, content), name=name, created_at=time.time())
        adapters = AdapterStore(store_root(run, store))
        adapters.publish(owner or owner_of(os.environ.get("RAYML_API_KEY")), manifest, Path(folder))
    labels = f"labels {', '.join(card.labels.values())}" if card.labels else "no labels of its own"
    out.print(f"published {manifest.id} ({labels}) in {adapters.root}", highlight=False, soft_wrap=True)


def copy_files(source: Path, folder: Path) -> None:
    """Copy an adapter's files, and no others, out of a folder or a zip. Paths in a zip are never followed."""
    try:
        if source.is_dir():
            contents = {name: (source / name).read_bytes() for name in FILES if (source / name).is_file()}
        else:
            with zipfile.ZipFile(source) as archive:
                contents = {name: archive.read(name) for name in FILES if name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise RunError(f"{source}: neither an adapter's folder nor a zip of one: {error}") from error
    for name, data in contents.items():
        (folder / name).write_bytes(data)
