"""Runs, data and adapters on object storage: a real S3 server in this process, spoken to as S3 is."""

import hashlib
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
import torch
from conftest import SPLITS, make_config, training_here
from moto.server import ThreadedMotoServer
from serving_process import KEYS, Server
from serving_run import TICKETS, examples, make_run

from rayml.api import evaluate
from rayml.errors import ConfigError, RunError, StorageError
from rayml.model import load
from rayml.runs import remote
from rayml.runs.checkpoint import newest_checkpoint, read_checkpoint, seal, verify, write_state
from rayml.runs.files import (
    checksum,
    copy_folder,
    list_matching,
    local_copy,
    local_output,
    parse_path,
    remove,
    write_atomically,
)
from rayml.runs.folder import RunFolder
from rayml.serving.store import owner_of
from rayml.training.driver import train


@pytest.fixture(scope="module")
def s3():
    """The address of an S3 server with an empty bucket named `bucket`."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    requests.put(f"{address}/bucket", timeout=60).raise_for_status()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        yield address
    server.stop()


@pytest.fixture(params=["local", "remote"])
def root(request, tmp_path, s3):
    return parse_path(tmp_path if request.param == "local" else f"s3://bucket/{request.node.name.partition('[')[0]}")


def test_both_kinds_of_places_answer_alike(root):
    folder = root / "a" / "b"
    assert not folder.exists()
    assert list_matching(folder, "*") == []
    folder.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "x.txt"
    for text in ("first", "größer"):
        write_atomically(file, text)
        assert file.read_text(encoding="utf-8") == text
    (folder / "y.bin").write_bytes(b"\0\1")
    assert [found.name for found in list_matching(folder, "*")] == ["x.txt", "y.bin"]
    assert [found.name for found in list_matching(folder, "*.bin")] == ["y.bin"]
    assert (folder.is_dir(), file.is_dir(), file.exists()) == (True, False, True)
    assert (file.parent.name, str(file)) == ("b", f"{root}/a/b/x.txt")
    assert checksum(file) == hashlib.sha256("größer".encode()).hexdigest()
    (folder / "stop").touch()
    (folder / "stop").unlink()
    (folder / "stop").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (folder / "stop").unlink()
    with pytest.raises(FileNotFoundError):
        (folder / "nothing").read_bytes()
    remove(root / "a")
    remove(root / "a")
    assert not file.exists()


def test_folders_are_copied_there_and_back(root, tmp_path):
    with local_output(root / "model") as made:
        (made / "sub").mkdir(parents=True)
        (made / "sub" / "weights").write_bytes(b"1" * 100_000)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "card").write_text("2")
    copy_folder(tmp_path / "more", root / "model")
    with local_copy(root / "model") as here:
        found = {str(file.relative_to(here)): file.stat().st_size for file in here.rglob("*") if file.is_file()}
    assert found == {"sub/weights": 100_000, "card": 1}


def test_a_folder_is_there_when_it_is_whole(tmp_path):
    """A process that is killed while it writes runs nothing that would clean up."""
    folder = tmp_path / "adapters" / "desk"
    (tmp_path / "adapters" / "desk.part").mkdir(parents=True)  # one that was killed
    (tmp_path / "adapters" / "desk.part" / "half").touch()
    with local_output(folder) as made:
        assert not made.exists()
        made.mkdir()
        (made / "weights").touch()
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["weights"]

    def fail():
        with local_output(tmp_path / "other") as made:
            made.mkdir()
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters"]
    assert [path.name for path in folder.parent.iterdir()] == ["desk"]


def test_uris_keep_their_settings(s3):
    run = parse_path(f"s3://bucket/runs/?region=us-east-1&endpoint_override={s3.removeprefix('http://')}&scheme=http")
    assert str(run / "first") == str(run).replace("runs?", "runs/first?")
    (run / "settings").write_text("kept")
    assert (parse_path(str(run / "settings")).read_text(), (run / "settings").parent) == ("kept", run)
    assert parse_path("s3://bucket/runs/settings").read_text() == "kept"
    assert parse_path("file:///a/b") == Path("/a/b")
    odd = parse_path("s3://bucket/my%20runs/a")
    (odd / "x").write_text("odd")
    assert (str(odd / "x"), parse_path("s3://bucket/my%20runs/a/x").read_text()) == ("s3://bucket/my%20runs/a/x", "odd")
    for wrong in ("floppy://a", "s3://"):
        with pytest.raises(StorageError, match=wrong):
            parse_path(wrong)


def test_a_growing_file_is_written_now_and_then_and_loses_no_line(s3, monkeypatch, caplog):
    monkeypatch.setattr(remote, "REWRITE_SECONDS", 1000)
    file = parse_path("s3://not-yet/metrics.jsonl")
    with file.open("a") as growing:
        growing.write("1\n")  # there is no such bucket
        assert "tried again later" in caplog.text
        requests.put(f"{s3}/not-yet", timeout=60).raise_for_status()
        growing.write("2\n")
        assert not file.exists()
        growing.flush()
        assert file.read_text() == "1\n2\n"
        growing.write("3\n")
    assert file.read_text() == "1\n2\n3\n"
    with file.open("a") as growing:
        growing.write("4\n")
    assert file.read_text() == "1\n2\n3\n4\n"


def test_a_damaged_checkpoint_is_passed_over_and_silent_storage_is_not(root, tmp_path):
    for step in (1, 2):
        part = tmp_path / f"part-{step}"
        part.mkdir()
        write_state(part, {"w": torch.full((3,), float(step))})
        seal(part, step, part=0, parts=1)
        copy_folder(part, root / "checkpoints" / f"step_{step:08d}")
    newest = newest_checkpoint(root / "checkpoints")
    assert (verify(newest), read_checkpoint(newest).tensors["w"].tolist()) == (2, [2.0] * 3)
    (newest / "state.safetensors").write_bytes(b"torn")
    assert verify(newest_checkpoint(root / "checkpoints")) == 1
    with pytest.raises(RunError, match="not what its manifest says"):
        read_checkpoint(newest)


class Silence(BaseHTTPRequestHandler):
    """Passes requests on to the S3 server, but answers that it is overloaded when a file of weights is read."""

    def pass_on(self):
        if self.command == "GET" and "state.safetensors" in self.path:
            self.send_error(503, "Slow Down")
            return
        headers = {name: value for name, value in self.headers.items() if name != "Host"}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = requests.request(self.command, self.server.behind + self.path, headers=headers, data=body, timeout=60)
        self.send_response(found.status_code)
        for name in ("ETag", "Last-Modified", "Content-Type", "Content-Range"):
            if name in found.headers:
                self.send_header(name, found.headers[name])
        length = found.headers["Content-Length"] if self.command == "HEAD" else str(len(found.content))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(found.content)

    do_GET = do_HEAD = do_PUT = do_POST = pass_on  # noqa: N815

    def log_message(self, *_): ...


def test_silent_storage_is_not_taken_for_damage(s3, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    write_state(part, {"w": torch.ones(3)})
    seal(part, 1, part=0, parts=1)
    checkpoints = parse_path("s3://bucket/silent/checkpoints")
    copy_folder(part, checkpoints / "step_00000001")
    assert verify(newest_checkpoint(checkpoints)) == 1
    server = ThreadingHTTPServer(("127.0.0.1", 0), Silence)
    server.behind = s3
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = f"region=us-east-1&endpoint_override=127.0.0.1:{server.server_port}&scheme=http"
    silent = RunFolder(f"s3://bucket/silent?{settings}")
    try:
        assert [folder.name for folder in list_matching(silent.checkpoints, "step_*")] == ["step_00000001"]
        with pytest.raises(StorageError, match=r"state\.safetensors"):
            newest_checkpoint(silent.checkpoints)
    finally:
        server.shutdown()
        server.server_close()
    with ThreadPoolExecutor() as pool:  # each is patient
        records, is_told = pool.submit(silent.records_after, 0), pool.submit(silent.is_stop_requested)
    assert records.result() == []
    assert not is_told.result()


def test_mlflow_without_a_server_is_refused_before_the_start(tmp_path, s3):
    config = make_config(tmp_path, run={"dir": "s3://bucket/mlflow", "trackers": ["mlflow"]})
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI"):
        train(config)
    assert not parse_path("s3://bucket/mlflow").exists()


@pytest.mark.ray
def test_train_resume_evaluate_and_adapt_by_uri(s3, tmp_path, straight):
    """As it is without; the local Ray began before the server: its workers know of it from the URI."""
    settings = f"?region=us-east-1&endpoint_override={s3.removeprefix('http://')}&scheme=http"
    config = make_config(
        tmp_path,
        data={"splits": SPLITS, "path": f"s3://bucket/data/toy.jsonl{settings}"},
        lora={"start": "principal"},
        validation={"every": 5, "episodes": 4},
        workers=2,
        run={"dir": f"s3://bucket/runs/first{settings}", "checkpoint_every": 5},
    )
    parse_path("s3://bucket/data/toy.jsonl").write_bytes((tmp_path / "toy.jsonl").read_bytes())

    run = train(config)
    assert run.latest.read_text() == "checkpoints/step_00000010\n"
    with pytest.raises(RunError, match="holds a run already"):
        train(config)
    expected = read_checkpoint(newest_checkpoint(straight.checkpoints))
    found = read_checkpoint(newest_checkpoint(run.checkpoints))
    assert found.step == expected.step == 10
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    (run.checkpoints / "step_00000010" / "state.safetensors").write_bytes(b"torn")
    assert [record["step"] for record in run.records()] == list(range(1, 11))
    with training_here():  # two workers that resume are in test_train
        run = train(config, resume=True)
    assert verify(newest_checkpoint(run.checkpoints)) == 10
    assert [record["step"] for record in run.records()] == list(range(1, 11))
    losses = [[record["query_loss"] for record in one.records()] for one in (run, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert verify(newest_checkpoint(run.best)) in (5, 10)
    events = list_matching(run.path / "tensorboard", "events*")
    assert len(events) == 2
    assert all(len(file.read_bytes()) > 500 for file in events)

    by_name = "s3://bucket/runs/first"  # the address is in the environment
    summary = evaluate(by_name, episodes=4)
    assert summary["outer_steps"] == 10
    assert json.loads((run.path / "evaluation.json").read_text())["overall"] == summary["overall"]
    assert (run.path / "adaptation.png").read_bytes().startswith(b"\x89PNG")
    rows = [{"task": "t", **example} for example in examples()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    load(by_name).adapt(tmp_path / "rows.jsonl").save("s3://bucket/adapter")
    assert (parse_path("s3://bucket/adapter") / "adapter_model.safetensors").exists()
    with pytest.raises(RunError, match="exists already"):
        load(by_name).adapt(tmp_path / "rows.jsonl").save("s3://bucket/adapter")


@pytest.mark.serve
def test_a_server_keeps_its_adapters_beside_the_run_on_object_storage(s3, tmp_path):
    copy_folder(make_run(tmp_path).path, parse_path("s3://bucket/served/run"))
    server = Server("s3://bucket/served/run", logs=tmp_path)
    try:
        adapter = server.client().learn(TICKETS, name="tickets")
        (answer,) = server.client().classify(adapter.model, ["charged twice"])
        assert answer.label in {"billing", "bug", "delivery"}
    finally:
        assert server.stop() == 0
    owner = owner_of(KEYS[0])
    assert (parse_path("s3://bucket/served/run/adapters") / owner / adapter.id / "manifest.json").exists()
