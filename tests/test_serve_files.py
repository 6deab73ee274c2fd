"""What lies in serve/: the application, and the YAML files, against Ray's own schemas."""

from pathlib import Path

import pytest
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema
from serving_run import make_run

from rayml.serving.settings import Serving
from serve.app import app

FOLDER = Path(__file__).parent.parent / "serve"


@pytest.mark.parametrize("name", ["serve.yaml", "vllm.yaml"])
def test_the_yaml_is_what_ray_serve_deploys(name):
    schema = ServeDeploySchema.model_validate(yaml.safe_load((FOLDER / name).read_text()))
    assert schema.http_options.host == "127.0.0.1"
    assert schema.applications[0].route_prefix == "/"


def test_the_application_takes_the_yaml_s_arguments(tmp_path):
    args = yaml.safe_load((FOLDER / "serve.yaml").read_text())["applications"][0]["args"]
    run = make_run(tmp_path / "r")
    serving = Serving.model_validate(args | {"run": str(run.path), "store": str(tmp_path / "store")})
    assert serving.replicas.max == 4
    assert isinstance(app(serving), serve.Application)


def test_the_vllm_configuration_fits_ray_serve_llm_s_schema():
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

    (config,) = yaml.safe_load((FOLDER / "vllm.yaml").read_text())["applications"][0]["args"]["llm_configs"]
    found = LLMConfig.model_validate(config)
    assert found.lora_config.max_num_adapters_per_replica == found.engine_kwargs["max_loras"]
    with pytest.raises(ValueError, match="lora_config"):
        LLMConfig.model_validate(config | {"lora_config": {"dynamic_lora_loading_path": "/local", "unknown": 1}})
