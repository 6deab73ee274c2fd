"""The real server: `rayml serve` with several replicas, over HTTP, through our client and OpenAI's."""

import contextlib
import re
import socket
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
import requests
from rich.console import Console
from serving_process import KEYS, free_port, wait_for
from serving_run import TICKETS, examples, make_run

from rayml.errors import ConfigError, RunError
from serve.client import ApiError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("server"))


def post(server, path, body, key=KEYS[0]):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return requests.post(server.url + path, json=body, headers=headers, timeout=120)


@pytest.mark.serve
def test_our_client_learns_asks_downloads_and_deletes(server, tmp_path):
    client = server.client()
    adapter = client.learn(TICKETS, name="tickets")
    assert client.learn(TICKETS, name="tickets") == adapter
    assert (adapter.examples, adapter.steps) == (6, 2)
    assert adapter.model == f"tiny:{adapter.id}"
    assert client.adapter("tickets") == adapter
    assert adapter in client.adapters()
    by_id, by_name = (client.classify(model, ["charged twice", "x"]) for model in (adapter.model, "tiny:tickets"))
    assert by_id == by_name
    assert set(by_id[0].probabilities) == {"billing", "bug", "delivery"}
    assert client.complete("tiny:tickets", "charged twice") == by_id[0].label
    assert "".join(client.stream("tiny", "hello", max_tokens=8)) == client.complete("tiny", "hello", max_tokens=8)
    client.download("tickets", tmp_path / "a.zip")
    assert "adapter_model.safetensors" in zipfile.ZipFile(tmp_path / "a.zip").namelist()
    client.delete("tickets")
    time.sleep(0.3)
    with pytest.raises(ApiError, match="404"):
        client.classify(adapter.model, ["x"])


@pytest.mark.serve
def test_openai_s_own_client_works(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0])
    adapter = server.client().learn(TICKETS, name="for-openai")
    assert adapter.model in [model.id for model in client.models.list()]
    assert client.models.retrieve(adapter.model).id == adapter.model
    asked = [{"role": "user", "content": "charged twice"}]
    chat = client.chat.completions.create(model=adapter.model, messages=asked, logprobs=True, top_logprobs=3)
    assert chat.choices[0].message.content in {"billing", "bug", "delivery"}
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 3
    whole = client.completions.create(model="tiny", prompt=["hello", "you"], max_tokens=6, logprobs=2)
    assert len(whole.choices) == 2
    assert len(whole.choices[0].logprobs.tokens) == 6
    assert whole.usage.completion_tokens == 12
    pieces = list(client.completions.create(
        model="tiny", prompt="hello", max_tokens=6, stream=True, stream_options={"include_usage": True}
    ))  # fmt: skip
    assert "".join(p.choices[0].text for p in pieces if p.choices) == whole.choices[0].text
    assert pieces[-1].usage.completion_tokens == 6
    streamed = list(client.chat.completions.create(model=adapter.model, messages=asked, stream=True))
    assert streamed[0].choices[0].delta.content == chat.choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="x", temperature=9)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()


@pytest.mark.serve
def test_a_key_sees_its_own_adapters_alone(server):
    mine = server.client().learn(TICKETS, name="mine")
    other = server.client(KEYS[1])
    assert mine.id not in [adapter.id for adapter in other.adapters()]
    for call in (
        lambda: other.classify(mine.model, ["x"]),
        lambda: other.delete(mine.id),
        lambda: other.adapter("mine"),
    ):
        with pytest.raises(ApiError, match="404"):
            call()
    for key in (None, "", KEYS[0][:-1], KEYS[0] + "x"):
        refused = post(server, "/v1/classify", {"model": "tiny", "input": "x"}, key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    for path in ("healthz", "readyz"):
        assert requests.get(f"{server.url}/{path}", timeout=120).status_code == 200


@pytest.mark.serve
@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("/v1/adapters", {"examples": []}, 422, "examples"),
        ("/v1/adapters", {"examples": examples(), "steps": 10**6}, 422, "steps"),
        ("/v1/adapters", {"examples": examples(), "name": "../../etc"}, 400, "name"),
        ("/v1/adapters", {"examples": examples([("a", "x"), ("a", "y")])}, 422, "examples"),
        ("/v1/adapters", {"examples": examples([("a\x00", "x"), ("b", "y")])}, 400, "examples.0.input"),
        ("/v1/classify", {"model": "tiny:s3://bucket/x", "input": "x"}, 404, "model"),
        ("/v1/classify", {"model": "tiny:/etc/passwd", "input": "x"}, 404, "model"),
        ("/v1/classify", {"model": "tiny", "input": "x"}, 422, "options"),
        ("/v1/classify", {"model": "tiny", "input": []}, 422, "input"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 10**6}, 422, "max_tokens"),
        ("/v1/completions", {"model": "tiny", "prompt": "x" * 5000}, 400, "prompt"),
        ("/v1/completions", {"model": "tiny", "prompt": "x" * 5000, "stream": True}, 400, "prompt"),
        ("/v1/completions", {"model": "tiny", "prompt": ""}, 400, "prompt"),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}, 400, "messages"),
        ("/v1/classify", {"model": "tiny", "input": "x" * 3_000_000}, 413, None),
    ],
)  # fmt: skip
def test_bad_requests_name_the_field(server, path, body, status, field):
    refused = post(server, path, body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, field)


@pytest.mark.serve
def test_what_others_have_and_this_server_has_not_is_said(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0])
    for call in (
        lambda: client.embeddings.create(model="tiny", input="x"),
        lambda: client.responses.create(model="tiny", input="x"),
    ):
        with pytest.raises(openai.NotFoundError, match="it has /v1/chat/completions") as refused:
            call()
        assert refused.value.code == "no_such_route"
    adapter = server.client().learn(TICKETS, name="for-delete")
    assert client.models.delete(adapter.model).deleted
    with pytest.raises(openai.PermissionDeniedError, match="cannot be deleted"):
        client.models.delete("tiny")
    codes = [
        post(server, "/v1/classify", {"model": m, "input": "x"}).json()["error"]["code"] for m in ("no", "tiny:no")
    ]
    assert codes == ["model_not_found"] * 2


@pytest.mark.serve
def test_an_adaptation_in_the_background_is_asked_for_until_it_is_learned(server):
    begun = requests.post(
        f"{server.url}/v1/adapters",
        json={"examples": examples(), "name": "later", "steps": 20},
        headers={"Authorization": f"Bearer {KEYS[0]}", "Prefer": "respond-async"},
        timeout=120,
    )
    assert (begun.status_code, begun.json()["status"]) == (202, "learning")
    assert begun.headers["Location"] == f"/v1/adapters/{begun.json()['id']}"
    learned = server.client().learn(TICKETS, name="later", steps=20, background=True)
    assert (learned.id, learned.status, learned.steps) == (begun.json()["id"], "ready", 20)
    with pytest.raises(ApiError, match="same label"):
        server.client().learn([("a", "x"), ("b", "x")], background=True)


@pytest.mark.serve
def test_a_damaged_file_is_the_server_s_fault(server):
    adapter = server.client().learn(TICKETS, name="damaged")
    (path,) = (server.log.parent / "run" / "adapters").glob(f"*/{adapter.id}/rayml.json")
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ApiError) as refused:
        server.client(tries=1).download(adapter.id, "never.zip")
    assert (refused.value.status, refused.value.code) == (500, "adapter_damaged")
    server.client().delete(adapter.id)


@pytest.mark.serve
def test_a_body_that_does_not_come_is_not_waited_for(server):
    with socket.create_connection(("127.0.0.1", server.port), 30) as slow:
        slow.sendall(
            f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n"
            "Content-Length: 100\r\n\r\n{".encode()
        )
        assert b" 408 " in slow.recv(4096).split(b"\r\n")[0]


@pytest.mark.serve
def test_the_server_and_its_ray_listen_on_this_machine_alone(server):
    """But for the port that Ray Serve opens in every replica, on all interfaces: serve/README.md says so."""
    here, replicas = set(), set()
    for process in server.processes():
        with contextlib.suppress(psutil.Error):
            found = here if "ServeReplica" not in " ".join(process.cmdline()) else replicas
            found |= {one.laddr for one in process.net_connections() if one.status == psutil.CONN_LISTEN}
    assert {server.port, server.metrics_port} <= {port for _, port in here}
    assert {address.removeprefix("::ffff:") for address, _ in here} == {"127.0.0.1"}
    assert {address.removeprefix("::ffff:") for address, _ in replicas} <= {"127.0.0.1", "::"}


@pytest.mark.serve
def test_the_docs_ask_nobody_else_for_anything(server):
    page = requests.get(f"{server.url}/docs", timeout=120)
    assert "POST /v1/adapters" in page.text
    assert "as in <code>/v1/adapters</code>" in page.text
    assert "://" not in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


@pytest.mark.serve
def test_a_hundred_adapters_are_never_mixed_up_while_a_replica_dies(server):
    """Every adapter has labels of its own. All that was acknowledged answers, whoever died."""
    client = server.client(tries=60)
    wait_for(lambda: len(server.replicas()) >= 2)

    def learn(n: int):
        return client.learn([(f"red {n}", f"yes-{n}"), (f"blue {n}", f"no-{n}")], name=f"load-{n}")

    def ask(n: int):
        began = time.perf_counter()
        (answer,) = client.classify(adapters[n].model, [f"red {n}"])
        assert set(answer.probabilities) == {f"yes-{n}", f"no-{n}"}
        return n, answer.probabilities, time.perf_counter() - began

    with ThreadPoolExecutor(16) as pool:
        adapters = list(pool.map(learn, range(100)))
        assert len({adapter.id for adapter in adapters}) == 100
        before = {n: probabilities for n, probabilities, _ in pool.map(ask, range(100))}
        assert len({round(found[f"yes-{n}"], 4) for n, found in before.items()}) > 30  # one's weights are not another's
        asked = [pool.submit(ask, n % 100) for n in range(300)]
        began = time.perf_counter()
        server.replicas()[0].kill()
        answers = [one.result() for one in asked]
    for n, probabilities, _ in answers:
        assert probabilities == pytest.approx(before[n], abs=1e-4)
    seconds = sorted(s for _, _, s in answers)
    rate = len(answers) / (time.perf_counter() - began)
    typical = f"median {seconds[150]:.3f} s, longest {seconds[-1]:.1f} s"
    print(f"300 requests over 100 adapters while a replica dies: {rate:.0f} a second, {typical}")
    assert {adapter.id for adapter in client.adapters()} >= {adapter.id for adapter in adapters}


@pytest.mark.serve
def test_the_logs_hold_nobody_s_text(server):
    secret = "quite-private-words"
    said = [
        post(server, "/v1/adapters", {"examples": examples([(secret, "x"), (secret, "y")])}),
        post(server, "/v1/adapters", {"examples": examples([("a", secret), ("b", "y")]), "options": ["y", "z"]}),
        post(server, "/v1/classify", {"model": "tiny", "input": secret, "options": ["x", secret]}),
        post(server, "/v1/completions", {"model": "tiny", "prompt": secret, "max_tokens": 4}),
        post(server, "/v1/completions", {"model": "tiny", "prompt": secret * 500}),
    ]
    assert [answer.status_code for answer in said] == [422, 422, 200, 200, 400]
    logs = server.session() / "logs"
    written = [path for path in logs.rglob("*") if path.is_file()]
    assert any('"event": "request"' in path.read_text(errors="replace").replace("\\", "") for path in written)
    assert [path.name for path in written if secret in path.read_text(errors="replace")] == []


@pytest.mark.serve
def test_prometheus_finds_what_happened(server):
    wait_for(lambda: server.metric("rayml_requests_total") > 400, 120)
    wait_for(lambda: server.metric("rayml_loads_total") > 0, 120)  # what the dead replica held
    assert server.metric("rayml_adaptations_total") > 10
    assert server.metric("rayml_request_seconds_count") > 400
    # Of the dead replica's there are none, and the others tell theirs now and then. The more queries in a batch, the
    # fewer batches: so the queries are counted.
    wait_for(lambda: server.metric("rayml_classify_batch_sum") > 200, 120)
    wait_for(lambda: server.metric("rayml_cached_adapters") > 10, 120)
    lines = requests.get(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=120).text.splitlines()
    (line, *_) = [line for line in lines if line.startswith("ray_rayml_adaptations_total{")]
    assert 'application="rayml"' in line
    assert 'deployment="Model"' in line
    assert re.search('replica="[^"]+"', line)


@pytest.mark.serve
def test_overload_is_429_with_retry_after_then_it_recovers(server):
    def ask(_):
        return post(server, "/v1/completions", {"model": "tiny", "prompt": "x" * 50, "max_tokens": 100})

    with ThreadPoolExecutor(300) as pool:
        answers = list(pool.map(ask, range(300)))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    assert all(answer.headers["Retry-After"] == "1" for answer in answers if answer.status_code == 429)
    assert post(server, "/v1/completions", {"model": "tiny", "prompt": "x"}).status_code == 200


@pytest.mark.serve
def test_replicas_are_added_under_load_and_taken_away_after_it(server):
    with ThreadPoolExecutor(14) as pool:  # no more: Ray Serve looks back upon half a minute
        load = [pool.submit(server.client(tries=100).complete, "tiny", "x", max_tokens=200) for _ in range(400)]
        wait_for(lambda: len(server.replicas()) == 3, 240)
        for one in load:
            one.cancel()
    wait_for(lambda: len(server.replicas()) == 2, 240)
    assert server.client().complete("tiny", "x", max_tokens=2)


@pytest.mark.serve
def test_adapters_outlive_every_replica(server):
    client = server.client(tries=90)
    adapter = client.learn(TICKETS, name="outlives")
    expected = client.classify(adapter.model, ["charged twice"])
    for replica in server.replicas():
        replica.kill()
    assert client.classify(adapter.model, ["charged twice"]) == expected
    assert client.learn(TICKETS, name="outlives") == adapter


@pytest.mark.serve
def test_after_kill_9_the_same_command_serves_what_was_acknowledged(server):
    adapter = server.client().learn(TICKETS, name="acknowledged")
    expected = server.client().classify(adapter.model, ["charged twice"])
    left = [process for process in server.processes() if process.pid != server.process.pid]
    server.process.kill()
    server.process.wait()
    assert any(process.is_running() for process in left)  # its Ray, which holds its ports
    server.start()
    assert psutil.wait_procs(left, 30)[1] == []
    assert server.client(tries=90).classify(adapter.model, ["charged twice"]) == expected
    assert server.client().adapter("acknowledged") == adapter


@pytest.mark.serve
def test_what_has_begun_ends_before_the_server_does(server):
    stream = server.client().stream("tiny", "hello", max_tokens=600)
    first = next(stream)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(server.stop)
        assert len(first + "".join(stream)) == 600
        assert ended.result() == 0


def test_a_taken_port_is_named_before_ray_starts(run, monkeypatch):
    from rayml.serving import command

    monkeypatch.setattr(command, "start_cluster", lambda *_: pytest.fail("Ray was started"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for ports in ((port, None), (free_port(), port)):
            with pytest.raises(ConfigError, match=f"port {port} is taken by process"):
                command.serve_forever(
                    str(run.path), [], "127.0.0.1", ports[0], None, None, ports[1], False, None, Console(quiet=True)
                )


def test_what_cannot_be_served_is_refused_before_ray_starts(run, monkeypatch, tmp_path):
    from rayml.serving import command

    def serve(run, *settings, host="127.0.0.1", insecure=False):
        command.serve_forever(str(run), settings, host, 8000, None, None, None, insecure, None, Console(quiet=True))

    def start(*_):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(command, "start_cluster", start)
    monkeypatch.delenv("RAYML_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match="no API key"):
        serve(run.path, host="0.0.0.0")
    with pytest.raises(RunError, match="no run here"):
        serve(tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean limits\.examples"):
        serve(run.path, "limits.example=3")
    with pytest.raises(AssertionError, match="started"):
        serve(run.path, host="0.0.0.0", insecure=True)
