"""The settings of a server. The text under a key is its documentation: `rayml serve --keys` prints it."""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rayml.errors import ConfigError
from rayml.sections import EXPAND_HOME, NotNegativeFloat, NotNegativeInt, Section
from rayml.serving.store import NAME, owner_of

MIB = 1 << 20


class Limits(Section):
    """The limits of a request. If it exceeds one, the error has the given status, and names the field and the limit."""

    body_bytes: PositiveInt = 2 * MIB
    """Size of a request body: 413."""
    examples: PositiveInt = 128
    """Examples of an adapter: 422."""
    inputs: PositiveInt = 64
    """Texts in one request to classify or complete: 422."""
    options: PositiveInt = 64
    """Labels to choose among: 422."""
    max_tokens: PositiveInt = 1024
    """Tokens that a request may generate: 422."""
    context_tokens: PositiveInt = 8192
    """Tokens of a prompt and its answer together, if the model's own context is longer: 400."""
    whole_tokens: PositiveInt = 4096
    """Tokens that have to be read in one piece while all else waits: an input to classify with its options (400), a
    prompt of a model with recurrent layers (400), the examples of an adapter with prototypes (422)."""
    body_seconds: PositiveFloat = 30
    """How long a client may take to send its request: 408."""
    steps: PositiveInt = 20
    """Inner steps of an adapter: 422."""
    adapters_per_key: PositiveInt = 10_000
    """Adapters that a key may have at a time: 429."""
    waiting_adaptations: PositiveInt = 32
    """Adaptations that may be under way in a replica, at most half of `replicas.ongoing_requests`: 429 with
    Retry-After."""
    waiting_queries: PositiveInt = 256
    """Queries that may wait in a replica: 429 with Retry-After."""
    retry_after_seconds: PositiveInt = 2
    """The value of Retry-After."""

    @model_validator(mode="after")
    def _a_request_can_wait(self) -> Self:
        if self.inputs > self.waiting_queries:
            raise ValueError(
                f"inputs: a request may have {self.inputs}, which is more than waiting_queries={self.waiting_queries}: "
                "it would never be taken; raise that, too"
            )
        return self


class Batching(Section):
    """How a replica shares its model."""

    rows: PositiveInt = 32
    """Texts that are written side by side."""
    cache_tokens: PositiveInt = 65_536
    """Most tokens in the cache of keys and values: rows times the longest row."""
    turn_tokens: PositiveInt | None = None
    """Tokens that each kind of work may run before the others get their turn: of queries, of new prompts (longer ones
    are read in parts), of examples to learn. By default 256 on a CPU, 8192 on a GPU."""
    queries: PositiveInt = 32
    """Queries that are classified in one forward."""
    adaptations: PositiveInt = 8
    """Adapters that are learned in one batched inner loop, if together they fit into `turn_tokens`."""
    adaptation_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the model's time that adaptations may take while queries wait."""


class Adapters(Section):
    """Adapters in memory and in the store."""

    cached_bytes: PositiveInt = 1024 * MIB
    """Memory for adapters in a replica; the least recently used are evicted first."""
    most_bytes: PositiveInt = 256 * MIB
    """Largest adapter file that is loaded."""
    most_rank: PositiveInt = 64
    """Largest LoRA rank that is loaded."""
    known_seconds: NotNegativeFloat = 2.0
    """How long the gateway remembers that an adapter exists; a deleted one may answer that much longer."""
    sweep_seconds: PositiveFloat = 600
    """How often expired adapters are deleted from the store."""


class Scaled(Section):
    """How many replicas of a kind there are, and what each gets."""

    min: PositiveInt = 1
    """Fewest replicas."""
    max: PositiveInt = 1
    """Most replicas; more than `min` turns autoscaling on."""
    target_ongoing_requests: PositiveFloat = 8
    """Requests per replica that autoscaling aims at."""
    upscale_delay_seconds: NotNegativeFloat = 10
    """How long the load must be too high before a replica is added."""
    downscale_delay_seconds: NotNegativeFloat = 300
    """How long the load must be too low before a replica is removed."""
    ongoing_requests: PositiveInt = 64
    """Requests that a replica takes at a time, and batches."""
    queued_requests: PositiveInt = 256
    """Requests that may wait in one gateway for a replica; beyond that, the answer is 429."""
    cpus: PositiveFloat | None = None
    """Ray's CPUs for a replica, and its number of threads. By default 1; with `rayml serve` on one machine, an equal
    share."""
    gpus: NotNegativeFloat | None = None
    """Ray's GPUs for a replica. By default 1 if the cluster has any."""
    drain_seconds: PositiveFloat = 30
    """How long a replica that is removed may take to finish its requests."""


class Replicas(Scaled):
    """The replicas that run our own engine. With engine=vllm they learn, and answer what vLLM cannot."""

    gateways: PositiveInt = 1
    """Replicas of the gateway, which need no model."""
    stuck_seconds: PositiveFloat = 600
    """A replica is replaced if one step of its model takes longer than this, or its model does not run at all."""


class Answerers(Scaled):
    """The replicas of vLLM, with engine=vllm."""

    target_ongoing_requests: PositiveFloat = 64
    """Requests per replica that autoscaling aims at."""
    ongoing_requests: PositiveInt = 512
    """Requests that a replica takes at a time, and vLLM batches."""
    queued_requests: PositiveInt = 1024
    """Requests that may wait in one gateway for a replica; beyond that, the answer is 429."""
    rows: PositiveInt = 64
    """Texts that are written, and queries that are classified, side by side (vLLM's `max_num_seqs`)."""
    loras: PositiveInt = 16
    """Different adapters among them (`max_loras`); others wait a step. Each takes the memory of the largest rank."""
    held_loras: PositiveInt = 256
    """Adapters in a replica's memory (`max_cpu_loras`); others are read from its disk again."""
    lora_rank: PositiveInt | None = None
    """Largest rank (`max_lora_rank`), by default the run's. It is rounded up, and a larger rank costs speed."""
    memory_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of a GPU's memory that vLLM takes, weights included (`gpu_memory_utilization`). By default `gpus` if that
    is less than one, else 0.9."""
    cache_bytes: PositiveInt | None = None
    """Memory for keys and values (`kv_cache_memory_bytes`). By default what the share leaves, and 1 GiB on a CPU."""
    tools: str | None = None
    """vLLM's parser for tool calls in the base's answers, such as `hermes` or `llama3_json`."""
    vllm: dict[str, Any] = {}  # noqa: RUF012 (pydantic copies it)
    """Further arguments of vLLM's engine, by their names in `AsyncEngineArgs`: `{quantization: fp8}`."""
    again_seconds: NotNegativeFloat = 120
    """How long a request is sent again when its answerer was lost, before the answer is 503."""


class Serving(Section):
    run: str
    """The run folder, on storage that all nodes share, or its URI."""
    checkpoint: Literal["best", "newest"] | None = None
    """`best` on meta-val, or `newest`. By default the best if there were validations, else the newest."""
    store: Annotated[str, EXPAND_HOME] | None = None
    """Where adapters are kept: a folder, or a URI (`s3://`, `gs://`). By default `adapters` in the run folder."""
    name: str | None = None
    """The base's name in `model`. By default the last part of the run's model.name."""
    keys_file: str | None = None
    """A file of API keys, one per line, as `name: key` or as a key alone; RAYML_API_KEYS adds to them. The name owns
    the adapters: keys of one name see the same ones. Without any keys, none is needed."""
    limits: Limits = Limits()
    batching: Batching = Batching()
    adapters: Adapters = Adapters()
    replicas: Replicas = Replicas()
    engine: Literal["local", "vllm"] = "local"
    """What answers. `local`: the replicas that learn. `vllm`: separate replicas of vLLM, for many requests at a time;
    it needs the extra `vllm`."""
    answerers: Answerers = Answerers()
    seed: NotNegativeInt | None = None
    """The seed of requests that give none. By default a random one."""


NAMED_KEY = re.compile(rf"({NAME.pattern}):\s+(\S+)")
HASH = re.compile("[0-9a-f]{16}")


def api_keys(keys_file: str | None) -> dict[str, str]:
    """Return the owner of each API key in a file, and in RAYML_API_KEYS (separated by commas).

    Raises:
        ConfigError: the file cannot be read, or holds no key; or a key is shorter than 16 characters.
    """
    lines = os.environ.get("RAYML_API_KEYS", "").split(",")
    if keys_file:
        try:
            file_lines = Path(keys_file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"keys_file: {keys_file}: cannot be read: {error}") from error
        file_lines = [line for line in file_lines if line.strip() and not line.startswith("#")]
        if not file_lines:
            raise ConfigError(f"keys_file: {keys_file}: holds no key")
        lines += file_lines
    keys = dict(parse_key(line.strip()) for line in lines if line.strip())
    short_keys = [key for key in keys if len(key) < 16]
    if short_keys:
        message = f"keys: {len(short_keys)} shorter than 16 characters; `openssl rand -hex 24` makes a good one"
        raise ConfigError(message)
    return keys


def parse_key(line: str) -> tuple[str, str]:
    """Return a key and its owner: the name before it, or else a hash of the key."""
    match = NAMED_KEY.fullmatch(line)
    if match is None:
        return line, owner_of(line)
    name, key = match.groups()
    if HASH.fullmatch(name):
        raise ConfigError(f"keys: {name!r} is not allowed as a name: it may be the hash of another key")
    return key, name


def check_host(host: str, keys: Collection[str], insecure: bool) -> None:
    """Raise ConfigError if others than this machine could reach the server, and need no key."""
    if host not in ("127.0.0.1", "localhost", "::1") and not keys and not insecure:
        raise ConfigError(
            f"--host {host}: others can reach this server there, but no API key is set; give --keys-file or "
            "RAYML_API_KEYS, or --insecure if something in front of it asks for keys"
        )
