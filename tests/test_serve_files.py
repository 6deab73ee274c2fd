"""What lies in serve/: the application, and the YAML files, against Ray's own schemas."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema
from serving_run import make_run

from rayml.serving.names import Names
from rayml.serving.settings import Serving
from serve.app import app
from serve.client import Client

FOLDER = Path(__file__).parent.parent / "serve"


def test_the_yaml_is_what_ray_serve_deploys():
    schema = ServeDeploySchema.model_validate(yaml.safe_load((FOLDER / "serve.yaml").read_text()))
    assert schema.http_options.host == "127.0.0.1"
    assert schema.applications[0].route_prefix == "/"


def test_the_application_takes_the_yaml_s_arguments(tmp_path):
    args = yaml.safe_load((FOLDER / "serve.yaml").read_text())["applications"][0]["args"]
    run = make_run(tmp_path / "r")
    serving = Serving.model_validate(args | {"run": str(run.path), "store": str(tmp_path / "store")})
    assert (serving.replicas.max, serving.answerers.max) == (4, 8)
    assert isinstance(app(serving), serve.Application)


@pytest.mark.parametrize("more", [{"steps": 3, "steps_taken": 1}, {}, {"error": {"message": "m"}, "status": "failed"}])
def test_the_client_can_look_at_what_is_being_learned(monkeypatch, more):
    body = Names("m", None, 0).learning("desk.0123456789abcdef") | more
    client = Client("http://127.0.0.1:8000")
    monkeypatch.setattr(client, "_request", lambda *_: SimpleNamespace(json=lambda: body))
    adapter = client.adapter("desk.0123456789abcdef")
    assert (adapter.name, adapter.status, adapter.created) == ("desk", body["status"], None)
