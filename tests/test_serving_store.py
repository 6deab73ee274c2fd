"""The store of adapters, what a replica holds of it, requests and settings."""

import asyncio
import shutil
import time
from pathlib import Path

import pytest
from serving_run import (  # noqa: F401
    TEXTS,
    TICKETS,
    ask,
    change_weights,
    examples,
    first,
    fits,
    learn,
    learned,
    make_run,
    manifest_of,
    replica,
    request,
    run,
    write,
)

from rayml.adapter import load_adapter
from rayml.errors import ConfigError, RunError
from rayml.serving.adapter_cache import AdapterCache
from rayml.serving.errors import ApiError
from rayml.serving.names import Names
from rayml.serving.schema import (
    AdapterRequest,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    Message,
    as_input,
    parse,
)
from rayml.serving.settings import Serving, api_keys, check_host
from rayml.serving.store import AdapterStore, DamagedError, adapter_id, owner_of
from rayml.tasks.task import Example


@pytest.fixture(params=["path", "uri"])
def store(request, tmp_path):
    return AdapterStore(str(tmp_path / "store") if request.param == "path" else f"file://{tmp_path}/store")


def test_what_is_published_is_found_by_id_and_name_by_its_owner_alone(store, learned):
    older, newer = (store.publish("public", manifest_of("t", number), learned) for number in (1, 2))
    assert store.find("public", older.id) == older
    assert store.find("public", "t") == newer
    ids = sorted([newer.id, older.id])
    assert [m.id for m in store.page("public")[0]] == ids
    assert store.page("public", most=1)[1]
    assert [m.id for m in store.page("public", after=ids[0])[0]] == ids[1:]
    assert store.find(owner_of("another key, long enough"), older.id) is None
    for reference in ("nobody", "../public/" + older.id, older.id + "/..", "", "t/", "T", "%2e%2e"):
        assert store.find("public", reference) is None
    store.delete("public", newer.id)
    assert store.find("public", "t") == older


def test_an_adapter_without_its_manifest_is_not_there(store, learned):
    whole = store.publish("public", manifest_of("t"), learned)
    store.fs.delete_file(f"{store.path}/public/{whole.id}/manifest.json")
    assert store.find("public", whole.id) is None
    assert store.page("public") == ([], None)
    store.publish("public", manifest_of("t"), learned)
    with store.fs.open_output_stream(f"{store.path}/public/{whole.id}/manifest.json") as file:
        file.write(b'{"id": "torn')
    assert store.find("public", whole.id) is None


def test_what_expired_is_gone(store, learned):
    store.publish("public", manifest_of("old", expires_at=time.time() - 1), learned)
    kept = store.publish("public", manifest_of("new", expires_at=time.time() + 60), learned)
    assert store.find("public", "old") is None
    assert store.count("public") == 2
    store.sweep()
    assert store.count("public") == 1
    assert store.renew("public", kept, None).expires_at is None
    assert store.find("public", kept.id).expires_at is None


def test_damaged_files_are_not_believed(store, learned, tmp_path):
    whole = store.publish("public", manifest_of("t"), learned)
    with store.fs.open_output_stream(f"{store.path}/public/{whole.id}/rayml.json") as file:
        file.write(b"{}")
    with pytest.raises(DamagedError, match="checksum"):
        store.fetch("public", whole, tmp_path)
    with pytest.raises(DamagedError, match="checksum"):
        store.read_verified("public", whole, "rayml.json")
    with pytest.raises(RunError, match="not a file"):
        store.read("public", whole.id, "../../secret")


def test_two_who_publish_the_same_leave_one_that_is_whole(store, learned, tmp_path):
    """The second writes its weights between the first one's weights and manifest."""
    other = tmp_path / "other"
    shutil.copytree(learned, other)
    change_weights(other, lambda tensors: tensors[first(tensors, "lora_B")].add_(1e-6))
    write, done = store._write_whole, []

    def interrupted(path, data):
        if path.endswith("manifest.json") and not done:
            done.append(True)
            store.publish("public", manifest_of("t"), other)
        write(path, data)

    store._write_whole = interrupted
    store.publish("public", manifest_of("t"), learned)
    store._write_whole = write
    (tmp_path / "fetched").mkdir()
    store.fetch("public", store.find("public", "t"), tmp_path / "fetched")


def test_the_least_recently_used_leave_and_come_back(replica, learned, tmp_path):
    store = AdapterStore(str(tmp_path / "store"))
    ids = [store.publish("public", manifest_of("t", number), learned).id for number in range(4)]
    seen: list[tuple[str, float]] = []
    size = load_adapter(learned).size
    adapter_cache = AdapterCache(store, fits(replica), 2 * size, replica._adapter_of, lambda *pair: seen.append(pair))

    async def use():
        first = await adapter_cache.get("public", ids[0])
        await adapter_cache.get("public", ids[1])
        assert await adapter_cache.get("public", ids[0]) is first
        await adapter_cache.get("public", ids[2])  # 1 leaves
        assert await adapter_cache.get("public", ids[0]) is first
        await asyncio.gather(*(adapter_cache.get("public", ids[1]) for _ in range(3)))
        with pytest.raises(ApiError) as missing:
            await adapter_cache.get("public", adapter_id("none", 0))
        return missing.value.status

    assert asyncio.run(use()) == 404
    names = [name for name, _ in seen]
    assert (names.count("loads"), names.count("evictions")) == (4, 2)
    assert seen[-1] == ("cached_bytes", 2 * size)


def test_a_damaged_adapter_is_the_server_s_fault_and_named_in_its_log(replica, learned, tmp_path, caplog):
    store = AdapterStore(str(tmp_path / "store"))
    made = store.publish("public", manifest_of("t"), learned)
    path = tmp_path / "store" / "public" / made.id / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    cache = AdapterCache(store, fits(replica), 1 << 30, replica._adapter_of, lambda *_: None)
    with pytest.raises(ApiError, match="damaged") as refused:
        asyncio.run(cache.get("public", made.id))
    assert (refused.value.status, refused.value.code) == (500, "adapter_damaged")
    assert f"adapter {made.id} of public is damaged" in caplog.text


@pytest.mark.parametrize(
    ("kind", "body", "field"),
    [
        (ClassifyRequest, b'{"model": "m", "input": "x", "inputs": 1}', "inputs"),
        (ClassifyRequest, b'{"model": "m", "input": 5}', "input"),
        (ClassifyRequest, b'{"model": "m", "input": "a\\u0000b"}', "input"),
        (CompletionRequest, b'{"model": "m", "prompt": "x", "temperature": NaN}', "temperature"),
        (CompletionRequest, b'{"model": "m", "prompt": "x", "n": 2}', "n"),
        (CompletionRequest, b'{"model": "m", "prompt": "x", "max_tokens": 0}', "max_tokens"),
        (ChatRequest, b'{"model": "m", "messages": []}', "messages"),
        (AdapterRequest, b'{"examples": [{"input": "x"}]}', "examples.0"),
        (AdapterRequest, b'{"examples": [{"messages": [{"role": "user", "content": "x"}]}]}', "examples.0"),
        (AdapterRequest, b'{"examples": [], "name": "a/b"}', "name"),
        (AdapterRequest, b'{"examples": [], "name": "a.b"}', "name"),
        (AdapterRequest, b'{"examples": [], "ttl_seconds": -1}', "ttl_seconds"),
        (ClassifyRequest, b"\xff\xfe", None),
        (ClassifyRequest, b"[" * 100_000, None),
        (ClassifyRequest, b'{"model": "m", "input": "\\ud800"}', None),
    ],
)
def test_bad_requests_are_400_and_name_the_field(kind, body, field):
    with pytest.raises(ApiError) as refused:
        parse(kind, body)
    assert (refused.value.status, refused.value.param) == (400, field)
    assert set(refused.value.body()["error"]) == {"message", "type", "param", "code"}


def test_conversations_become_inputs():
    asked = [
        Message(role="system", content="Be brief."),
        Message(role="user", content=[{"type": "text", "text": "hi"}]),
    ]
    assert as_input(asked) == "Be brief.\n\nhi"
    longer = [*asked, Message(role="assistant", content="yes?"), Message(role="user", content="bye")]
    assert as_input(longer) == "system: Be brief.\nuser: hi\nassistant: yes?\nuser: bye"
    example = parse(AdapterRequest, b'{"examples": [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " yo"}]}]}').examples[0]  # fmt: skip  # noqa: E501
    assert example.example() == Example("hi", "yo")
    assert example.example(is_dialogue=True).parts == (("user", "hi"), ("assistant", "yo"))
    fields = parse(AdapterRequest, b'{"examples": [{"input": {"premise": "a", "hypothesis": "b"}, "target": "no"}]}')
    assert fields.examples[0].example().parts == (("premise", "a"), ("hypothesis", "b"))


def test_every_serving_setting_is_explained():
    from rayml.config import keys

    explained = {name: text for name, (_, text) in keys(Serving).items()}
    assert len(explained) > 30
    assert [name for name, text in explained.items() if not text] == []


def test_a_store_at_home_is_the_same_to_all(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Serving(run="r", store="~/adapters").store == AdapterStore("~/adapters").path == f"{tmp_path}/adapters"


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# team a\n" + "a" * 20 + "\n\n" + "b" * 20 + "\n")
    monkeypatch.setenv("RAYML_API_KEYS", "c" * 20)
    assert api_keys(str(file)) == {key: owner_of(key) for key in ("a" * 20, "b" * 20, "c" * 20)}
    monkeypatch.setenv("RAYML_API_KEYS", "short")
    with pytest.raises(ConfigError, match="16 characters"):
        api_keys(None)
    file.write_text("#\n")
    monkeypatch.delenv("RAYML_API_KEYS")
    with pytest.raises(ConfigError, match="no key"):
        api_keys(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        api_keys(str(tmp_path / "none"))


def test_names_own_adapters_so_that_a_key_can_be_changed(tmp_path, monkeypatch):
    monkeypatch.delenv("RAYML_API_KEYS", raising=False)
    file = tmp_path / "keys"
    file.write_text(f"desk: {'a' * 20}\ndesk: {'b' * 20}\nlab:\t{'c' * 20}\nodd:{'d' * 20}\n")
    odd = "odd:" + "d" * 20  # no space behind the name: a key of its own
    assert api_keys(str(file)) == {"a" * 20: "desk", "b" * 20: "desk", "c" * 20: "lab", odd: owner_of(odd)}
    file.write_text(f"{owner_of('x' * 20)}: {'a' * 20}\n")
    with pytest.raises(ConfigError, match="hash of another key"):
        api_keys(str(file))


def test_a_key_that_gets_a_name_keeps_its_adapters(store, learned, caplog):
    from rayml.serving.app import settle_owners

    key = "k" * 20
    made = store.publish(owner_of(key), manifest_of("mine"), learned)
    store.publish("public", manifest_of("before-keys"), learned)
    settle_owners(store, {key: owner_of(key)})
    assert store.find(owner_of(key), made.id)
    settle_owners(store, {key: "desk"})
    assert store.find("desk", made.id) == made
    assert store.find(owner_of(key), made.id) is None
    assert "1 adapters were made without a key" in caplog.text
    assert f"rayml store move {store.root} public NAME" in caplog.text


def test_a_damaged_adapter_does_not_keep_a_server_from_starting(store, learned, caplog):
    from rayml.serving.app import settle_owners

    old_owner = owner_of("k" * 20)
    damaged, whole = (store.publish(old_owner, manifest_of(name), learned) for name in ("a", "b"))
    store.fs.delete_file(f"{store.path}/{old_owner}/{damaged.id}/rayml.json")
    settle_owners(store, {"k" * 20: "desk"})
    assert store.find("desk", whole.id) == whole
    assert f"adapter {damaged.id} cannot be moved to desk: rayml.json is gone" in caplog.text


def test_the_base_s_name_may_have_a_colon(store, learned):
    made, names = store.publish("public", manifest_of("t"), learned), Names("llama:8b", store, 2)
    assert asyncio.run(names.adapter("public", "llama:8b")) is None
    for reference in (made.id, "t"):
        assert asyncio.run(names.adapter("public", f"llama:8b:{reference}")) == made.id
    for unknown in ("llama", "llama:8b:", "llama:8", "llama:8bt", ""):
        with pytest.raises(ApiError, match="no "):
            asyncio.run(names.adapter("public", unknown))


def test_what_failed_in_the_background_can_be_deleted_and_what_is_being_learned_cannot(store):
    names, failed, learning = Names("m", store, 2), "a." + "0" * 16, "b." + "0" * 16
    store.write_request("public", failed, b'{"error": {"message": "no memory"}}')
    store.write_request("public", learning, b'{"name": "b"}')
    assert asyncio.run(names.delete("public", failed)) == failed
    assert store.read_request("public", failed) is None
    with pytest.raises(ApiError, match="still being learned") as refused:
        asyncio.run(names.delete("public", learning))
    assert refused.value.status == 409
    with pytest.raises(ApiError, match="no adapter"):
        asyncio.run(names.delete("public", failed))


def test_an_adapter_moved_to_its_own_owner_stays(store, learned):
    made = store.publish("desk", manifest_of("t"), learned)
    store.move("desk", made.id, "desk")
    assert store.find("desk", made.id) == made


def test_rayml_store_lists_moves_and_deletes(store, learned):
    from typer.testing import CliRunner

    from rayml.cli import app

    def output_of(*words):
        result = CliRunner().invoke(app, ["store", *words])
        return result.output if result.exit_code == 0 else f"refused: {result.exception}"

    made = store.publish("public", manifest_of("t"), learned)
    assert made.id in output_of("list", store.root)
    assert "public -> desk" in output_of("move", store.root, "public", "desk", "t")
    assert store.find("desk", "t") == made
    assert store.owners() == ["desk"]
    assert "has no adapter 'none'" in output_of("delete", store.root, "desk", "none")
    assert "refused" in output_of("move", store.root, "desk", "../x")
    assert "deleted" in output_of("delete", store.root, "desk", made.id)
    assert store.owners() == []
    assert "no folder" in output_of("list", f"{store.root}-typo")
    assert not Path(f"{store.root}-typo").exists()


def test_others_are_let_in_by_a_key_alone():
    for host in ("127.0.0.1", "localhost", "::1"):
        check_host(host, frozenset(), insecure=False)
    check_host("0.0.0.0", frozenset({"k" * 16}), insecure=False)
    check_host("0.0.0.0", frozenset(), insecure=True)
    with pytest.raises(ConfigError, match="no API key"):
        check_host("0.0.0.0", frozenset(), insecure=False)
