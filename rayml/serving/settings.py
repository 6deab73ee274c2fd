"""Settings of a server. The text under a key is its documentation: `rayml serve --keys` prints it."""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from rayml.errors import ConfigError
from rayml.sections import NotNegativeFloat, NotNegativeInt, Section
from rayml.serving.store import NAME, owner_of

MIB = 1 << 20


class Limits(Section):
    """What a request may ask for. Beyond it, the answer names the field and the limit."""

    body_bytes: PositiveInt = 2 * MIB
    """Longest request body: 413."""
    examples: PositiveInt = 128
    """Examples of an adapter: 422."""
    inputs: PositiveInt = 64
    """Texts in one request to classify or to complete: 422."""
    options: PositiveInt = 64
    """Labels that an answer is chosen among: 422."""
    max_tokens: PositiveInt = 1024
    """Tokens that a request may generate: 422."""
    context_tokens: PositiveInt = 8192
    """Tokens of a prompt and its answer together, where the model's own context is longer: 400."""
    whole_tokens: PositiveInt = 4096
    """Tokens of what is read in one piece, while all others wait: an input to classify with all that is asked about it,
    a prompt of a model with recurrent layers (400), a lesson by prototypes (422)."""
    body_seconds: PositiveFloat = 30
    """How long a client may take to send its request: 408."""
    steps: PositiveInt = 20
    """Inner steps of an adapter: 422."""
    adapters_per_key: PositiveInt = 10_000
    """Adapters that a key may have at a time: 429."""
    waiting_adaptations: PositiveInt = 32
    """Adaptations that may be under way in a replica, and never more than half of what it takes at a time: 429 with
    Retry-After."""
    waiting_queries: PositiveInt = 256
    """Queries that may wait in a replica: 429 with Retry-After."""
    retry_after_seconds: PositiveInt = 2
    """What Retry-After says."""


class Batching(Section):
    """How a replica shares its model."""

    rows: PositiveInt = 32
    """Texts that are generated side by side."""
    cache_tokens: PositiveInt = 65_536
    """Most tokens in the cache of keys and values: rows times the longest of them."""
    turn_tokens: PositiveInt | None = None
    """Tokens that each kind of work may run at a time, so that others wait no longer: of queries, of new prompts
    (longer ones are read in parts), of examples to learn. Else 256 on a CPU, 8192 on a GPU."""
    queries: PositiveInt = 32
    """Queries that are classified in one forward."""
    adaptations: PositiveInt = 8
    """Adapters that are learned in one batched inner loop, where they fit into `turn_tokens` together."""
    adaptation_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the model's time that adaptations may take while queries wait."""


class Adapters(Section):
    """Adapters in memory and in the store."""

    cached_bytes: PositiveInt = 1024 * MIB
    """Memory for adapters in a replica; the least recently used go first."""
    most_bytes: PositiveInt = 256 * MIB
    """Largest adapter file that is loaded."""
    most_rank: PositiveInt = 64
    """Largest LoRA rank that is loaded."""
    known_seconds: NotNegativeFloat = 2.0
    """How long the gateway remembers that an adapter is there; a deleted one may answer that much longer."""
    sweep_seconds: PositiveFloat = 600
    """How often expired adapters are deleted from the store."""


class Scaled(Section):
    """How many replicas there are of a kind, and what each gets."""

    min: PositiveInt = 1
    """Fewest replicas."""
    max: PositiveInt = 1
    """Most replicas; more than `min` turns autoscaling on."""
    target_ongoing_requests: PositiveFloat = 8
    """Requests a replica that autoscaling aims at."""
    upscale_delay_seconds: NotNegativeFloat = 10
    """How long there must be too much to do before a replica is added."""
    downscale_delay_seconds: NotNegativeFloat = 300
    """How long there must be too little to do before one is taken away."""
    ongoing_requests: PositiveInt = 64
    """Requests that a replica takes at a time; it batches among these."""
    queued_requests: PositiveInt = 256
    """Requests that wait for a replica behind one gateway, before the answer is 429."""
    cpus: PositiveFloat | None = None
    """Ray's CPUs for a replica; its threads are as many. Else 1; with `rayml serve` on one machine an equal share."""
    gpus: NotNegativeFloat | None = None
    """Ray's GPUs for a replica; else 1 where the cluster has any."""
    drain_seconds: PositiveFloat = 30
    """How long a replica that is taken away may finish what it has begun."""


class Replicas(Scaled):
    """The replicas of our own model. With engine=vllm they learn, and answer what vLLM cannot."""

    gateways: PositiveInt = 1
    """Replicas of the gateway, which need no model."""
    stuck_seconds: PositiveFloat = 600
    """A replica is given up when one step of its model takes longer than this, or its model does not run at all."""


class Answerers(Scaled):
    """The replicas of vLLM, where engine=vllm."""

    target_ongoing_requests: PositiveFloat = 64
    """Requests a replica that autoscaling aims at."""
    ongoing_requests: PositiveInt = 512
    """Requests that a replica takes at a time; vLLM batches among these."""
    queued_requests: PositiveInt = 1024
    """Requests that wait for a replica behind one gateway, before the answer is 429."""
    rows: PositiveInt = 64
    """Texts that are written, or queries that are classified, side by side (vLLM's `max_num_seqs`)."""
    loras: PositiveInt = 16
    """Adapters among them (`max_loras`): others wait a step. Each takes the room of the largest rank."""
    held_loras: PositiveInt = 256
    """Adapters in the memory of a replica (`max_cpu_loras`); others are read from its disk again."""
    lora_rank: PositiveInt | None = None
    """Largest rank (`max_lora_rank`); the run's, if none is given. vLLM rounds up, and a rank too large costs speed."""
    memory_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of a GPU's memory that vLLM takes, weights and all (`gpu_memory_utilization`); else `gpus` where that is a
    part of a card, else 0.9."""
    cache_bytes: PositiveInt | None = None
    """Memory for keys and values (`kv_cache_memory_bytes`); else what the share leaves, and 1 GiB on a CPU."""
    tools: str | None = None
    """How calls of tools are read from what the base writes: a parser of vLLM, such as `hermes` or `llama3_json`."""
    vllm: dict[str, Any] = {}  # noqa: RUF012 (pydantic copies it)
    """Further arguments of vLLM's engine, by its own names (`AsyncEngineArgs`): `{quantization: fp8}`."""
    again_seconds: NotNegativeFloat = 120
    """How long a request is sent anew when the answerer that had it was lost, before the answer is 503."""


class Serving(Section):
    run: str
    """The run folder, on storage that all nodes share, or its URI."""
    checkpoint: Literal["best", "newest"] | None = None
    """`best` by meta-val, or `newest`; None: the best where there were validations."""
    store: str | None = None
    """Where adapters are kept: a folder, or a URI (`s3://`, `gs://`); else `adapters` in the run folder."""
    name: str | None = None
    """What the base is called in `model`; else the last part of the run's model.name."""
    keys_file: str | None = None
    """API keys, one a line, each as `name: key`, or a key alone; RAYML_API_KEYS adds to them. A name owns adapters:
    keys of one name see the same ones. None: no key is asked for."""
    limits: Limits = Limits()
    batching: Batching = Batching()
    adapters: Adapters = Adapters()
    replicas: Replicas = Replicas()
    engine: Literal["local", "vllm"] = "local"
    """What answers. `local`: the replicas that learn. `vllm`: replicas of vLLM beside them, for many requests at a
    time; it needs the extra `vllm`."""
    answerers: Answerers = Answerers()
    seed: NotNegativeInt | None = None
    """Seed of requests that give none; None draws one."""


NAMED_KEY = re.compile(rf"({NAME.pattern}):\s+(\S+)")
HASH = re.compile("[0-9a-f]{16}")


def api_keys(keys_file: str | None) -> dict[str, str]:
    """Return the API keys of a file and of RAYML_API_KEYS (separated by commas), each with the owner of its adapters.

    Raises:
        ConfigError: the file cannot be read, or holds no key; or a key is shorter than 16 characters.
    """
    lines = os.environ.get("RAYML_API_KEYS", "").split(",")
    if keys_file:
        try:
            found = Path(keys_file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"keys_file: {keys_file}: cannot be read: {error}") from error
        found = [line for line in found if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigError(f"keys_file: {keys_file}: holds no key")
        lines += found
    keys = dict(owned_key(line.strip()) for line in lines if line.strip())
    short = [key for key in keys if len(key) < 16]
    if short:
        raise ConfigError(f"keys: {len(short)} shorter than 16 characters; `openssl rand -hex 24` makes a good one")
    return keys


def owned_key(line: str) -> tuple[str, str]:
    """Return a key and its owner: the name before it, or, of a key alone, what is made of the key."""
    named = NAMED_KEY.fullmatch(line)
    if named and HASH.fullmatch(named[1]):
        raise ConfigError(f"keys: {named[1]!r} is no name: it may be what is made of another key")
    return (named[2], named[1]) if named else (line, owner_of(line))


def check_host(host: str, keys: Collection[str], insecure: bool) -> None:
    """Raise ConfigError where everyone who reaches this machine could use the server."""
    if host not in ("127.0.0.1", "localhost", "::1") and not keys and not insecure:
        raise ConfigError(
            f"--host {host}: others reach this server there, and no API key is set; give --keys-file or "
            "RAYML_API_KEYS, or say --insecure where something in front of it asks for keys"
        )
