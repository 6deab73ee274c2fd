"""The one mechanism of settings: YAML, overrides, and errors that help."""

from pathlib import Path

import pytest
import yaml

from rayml.config import dump_config, keys, load_config, parse_config
from rayml.errors import ConfigError
from rayml.runs.folder import RunFolder

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: tiny}\ndata: {path: a.jsonl}\nrun: {dir: runs/a}\n")
    return file


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(config):
    load_config(config)


def test_configs_are_shipped():
    assert "quickstart.yaml" in {path.name for path in CONFIGS}


def test_overrides_win_and_take_yaml_values(path):
    config = load_config(path, ["inner.lr=1e-2", "data.path=[a.jsonl, b.jsonl]", "workers=2", "data.splits.by_class=x"])
    assert config.inner.lr == 0.01
    assert config.data.path == ("a.jsonl", "b.jsonl")
    assert config.tasks_per_worker == 2
    assert config.data.splits.by_class == ("x",)


def test_the_dumped_config_reads_back_the_same(path, tmp_path):
    config = load_config(path, ["inner.lr=0.7"])
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_every_mistake_is_named_at_once_with_the_nearest_key(path):
    with pytest.raises(ConfigError) as error:
        load_config(path, ["workrs=2", "inner.setps=3", "outer.lr=-1", "data.labels=numbers", "data.quries=2"])
    message = str(error.value)
    assert "5 mistake(s)" in message
    assert "workrs: no such key; did you mean workers?" in message
    assert "inner.setps: no such key; did you mean inner.steps?" in message
    assert "data.quries: no such key; did you mean data.queries?" in message
    assert "outer.lr: Input should be greater than 0, got -1" in message
    assert "data.labels: Input should be 'words' or 'letters', got 'numbers'" in message


def test_a_missing_key_is_named(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {name: tiny}\nrun: {dir: a}\n")
    with pytest.raises(ConfigError, match="data: required"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks_per_step=3", "workers=2"], "tasks_per_step: 3 is not a multiple of workers=2; use 4"),
        (["data.prompt=hello"], "data.prompt: template 'hello': shows nothing of the input"),
        (["data.prompt='{{ input'"], "data.prompt: template .* unexpected end of template"),
        (
            ["data.templates={pair: '{% for n in range(9) %}{{ n }}{% endfor %}'}"],
            r"data.templates.pair: .*`for` goes over `parts` alone",
        ),
        (["data.kind=poem"], "data.kind: Input should be"),
        (["data.columns={inputs: text}"], "data.columns: inputs unknown"),
        (["inner.lr"], "expected key=value"),
        (["workers.x=1"], "no such key|not a section|valid integer"),
    ],
)
def test_combinations_that_cannot_run_are_refused(path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(path, overrides)


@pytest.mark.parametrize(("text", "message"), [("- a\n", "expected keys and values"), ("a: [", "not YAML")])
def test_a_file_that_is_no_config_is_refused(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "run.yaml")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "no.yaml")


def test_every_key_says_what_it_means():
    undocumented = [name for name, (_, meaning) in keys().items() if not meaning]
    assert set(undocumented) <= {"seed", "lora.rank", "outer.weight_decay"}
    assert len(keys()) <= 90  # few: the rest is derived


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ["mode=full", "algorithm.name=maml", "model.attention=eager"],
            "mode=full can learn label tokens only, to first order",
        ),
        (["mode=full", "algorithm.name=protonet"], "not protonet"),
        (["mode=full", "regularize.lora_dropout=0.1"], "it is for adapter=lora, and mode=adapters"),
        (["algorithm.name=maml", "model.attention=sdpa"], "model.attention=eager"),
        (["algorithm.name=maml", "model.attention=eager", "engine=zero"], "use engine=local"),
        (["algorithm.name=maml", "model.attention=eager", "model.activation_checkpointing=true"], "keeps the graph"),
        (["algorithm.name=reptile", "inner.steps=0"], "learns from its inner steps"),
        (["engine=zero", "zero.stage=2"], "only stage 3 saves anything"),
        (["zero.offload=optimizer"], "mode=full with engine=zero"),
        (["mode=full", "engine=zero", "zero.stage=2", "zero.offload=all"], "all needs zero.stage=3"),
        (["validation.patience=2", "validation.every=0"], "it never stops"),
        (["data.most_per_class=6", "data.shots=3", "data.queries=4"], "data.queries=4; give 7 or more"),
    ],
)
def test_choices_that_do_not_go_together_are_refused_with_the_reason(overrides, reason):
    values = {"model": {"name": "tiny"}, "data": {"path": "a.jsonl"}, "run": {"dir": "r"}}
    with pytest.raises(ConfigError) as error:
        parse_config(values, "here", overrides)
    assert reason in str(error.value)


BEFORE = {"inner": {"lr": 0.2, "learn_lr": False}, "outer": {"lr": 0.1, "start_weight": 0.25}}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fomaml", {"name": "fomaml_plus", "learn_rates": False, "start_weight": 0.25}),
        ("meta_sgd", {"name": "meta_sgd", "start_weight": 0.25}),
        ("reptile", {"name": "reptile"}),
    ],
)
def test_a_run_folder_from_before_algorithms_had_settings_opens_as_what_it_was(name, settings, tmp_path):
    values = {"model": {"name": "tiny"}, "data": {"path": "a.jsonl"}, "run": {"dir": "r"}, "algorithm": {"name": name}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | BEFORE))
    config = RunFolder(tmp_path).read_config()
    common = {"readout", "pooling", "label_names", "prototype_steps", "texts_in_context"}
    assert config.algorithm.model_dump(exclude=common) == settings
    assert (config.inner.lr, config.outer.lr) == (0.2, 0.1)
    with pytest.raises(ConfigError) as error:  # whoever writes a config is told where a key went
        load_config(tmp_path / "config.yaml")
    assert "inner.learn_lr: is a setting of the algorithm: algorithm.learn_rates" in str(error.value)
    assert "outer.start_weight: is a setting of the algorithm: algorithm.start_weight" in str(error.value)


def test_a_changed_algorithm_forgets_the_settings_of_the_one_before():
    values = {"model": {"name": "tiny"}, "data": {"path": "a.jsonl"}, "run": {"dir": "r"}}
    values["algorithm"] = {"name": "fomaml_plus", "start_weight": 0.5}
    assert parse_config(values, "here", ["algorithm.name=fomaml_plus"]).algorithm.start_weight == 0.5
    assert parse_config(values, "here", ["algorithm.name=reptile"]).algorithm.settings() == {
        "readout": "labels",
        "pooling": "last",
        "label_names": 0,
        "prototype_steps": 80,
        "texts_in_context": False,
    }
    # In whatever order they are given.
    other = parse_config(values, "here", ["algorithm.start_weight=0.25", "algorithm.name=meta_sgd"]).algorithm
    assert (other.name, other.start_weight) == ("meta_sgd", 0.25)
    with pytest.raises(ConfigError, match=r"algorithm\.start_weight: no setting of this algorithm"):
        parse_config(values | {"algorithm": {"name": "fomaml", "start_weight": 0.5}}, "here")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.path=*.jsonl", "data.path", ("*.jsonl",)),
        ("data.path=**/*.jsonl", "data.path", ("**/*.jsonl",)),
        ("data.path=[v2].jsonl", "data.path", ("[v2].jsonl",)),
        ("data.path=a #b.jsonl", "data.path", ("a #b.jsonl",)),
        ("data.path=['a, b.jsonl', 007]", "data.path", ("a, b.jsonl", "007")),
        ("data.path='a: b.jsonl'", "data.path", ("a: b.jsonl",)),
        ("data.path='a' and 'b'", "data.path", ("'a' and 'b'",)),
        ("data.prompt={input}", "data.prompt", "{input}"),
        ("data.prompt={input}: yes # or no", "data.prompt", "{input}: yes # or no"),
        ("data.templates.pair={input}", "data.templates", {"pair": ("{input}",)}),
        ("data.columns={input: yes, target: no}", "data.columns", {"input": "yes", "target": "no"}),
        ("data.columns={input: 0, target: 01}", "data.columns", {"input": "0", "target": "01"}),
        ("data.splits.test_tasks=[yes, no]", "data.splits.test_tasks", ("yes", "no")),
        ("data.splits.test_tasks=[007]", "data.splits.test_tasks", ("007",)),
        ("data.splits.test_tasks=null", "data.splits.test_tasks", ("null",)),
        ("run.dir=2024-01-01", "run.dir", "2024-01-01"),
        ("run.continues=null", "run.continues", None),
        ("data.kind=null", "data.kind", None),
        ("seed=010", "seed", 10),
        ("seed=0x10", "seed", 16),
        ("outer.lr=1e-2", "outer.lr", 0.01),
        ("data.drop_small_classes=yes", "data.drop_small_classes", True),
        ("workers=[1, 2]", "workers", (1, 2)),
    ],
)
def test_an_override_is_read_as_what_its_setting_is(path, tmp_path, override, key, value):
    config = load_config(path, [override])
    for kept in (config, load_config(put(tmp_path, dump_config(config)))):
        for part in key.split("."):
            kept = getattr(kept, part)
        assert kept == value


def put(folder, text):
    (folder / "kept.yaml").write_text(text)
    return folder / "kept.yaml"


@pytest.mark.parametrize("name", ["1e5", "yes", "010", "2024-01-01", "0o7", "~", "1_000", "null", "a: b", "#"])
def test_text_that_looks_like_another_value_is_kept(name, path, tmp_path):
    config = load_config(path, {"model.name": "x", "data.splits.test_tasks": [name]})
    assert load_config(put(tmp_path, dump_config(config))).data.splits.test_tasks == (name,)


def test_values_of_yaml_are_those_of_yaml_1_2(tmp_path):
    config = put(
        tmp_path, "model: {name: a}\ndata: {path: b, splits: {test_tasks: [yes, no]}}\nrun: {dir: c}\nseed: 010\n"
    )
    assert (load_config(config).data.splits.test_tasks, load_config(config).seed) == (("yes", "no"), 10)
    with pytest.raises(ConfigError, match=r"test_tasks.0: Input should be a valid string: quote it in YAML, got 7"):
        load_config(put(tmp_path, "model: {name: a}\ndata: {path: b, splits: {test_tasks: [007]}}\nrun: {dir: c}\n"))
    with pytest.raises(ConfigError, match="within each other"):
        load_config(put(tmp_path, "a: " + "[" * 9999))


def test_values_of_other_shapes_are_refused_by_their_key():
    values = {"model": {"name": "tiny"}, "data": {"path": "a.jsonl"}, "run": {"dir": "r"}}
    with pytest.raises(ConfigError, match=r"algorithm.name: algorithm is a value, not a section"):
        load_config(values | {"algorithm": "maml"}, ["algorithm.name=fomaml"])
    with pytest.raises(ConfigError, match=r"inner.1: no such key"):
        load_config(values | {"inner": {1: 2}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["outer.lr=1", "outer.lr=2"], "outer.lr: given twice"),
        (["data.path=[*.jsonl]"], r"quote its texts"),
        (["data.path="], "data.path"),
        (["run.dir="], "run.dir: Input should be a valid string"),
    ],
)
def test_overrides_that_say_two_things_or_none_are_refused(path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(path, overrides)
