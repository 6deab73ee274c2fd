"""What the frozen layers make of an example that comes back is looked up, and changes no number."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TARGETS, make_config, perturbed_start, toy_tasks
from families import make_model
from tokenizers.processors import Sequence

from rayml.algorithms.inner_loop import expand, task_gradients
from rayml.lm.batch import collate
from rayml.lm.catalog import resolve_model
from rayml.lm.encode import Encoder
from rayml.lm.frozen import BLOCK_TOKENS, WorkerShare, blocks, compute_known_states
from rayml.lm.load import load_base, load_tokenizer
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM
from rayml.lm.rows import TokenRow
from rayml.lm.sides import training_sides
from rayml.tasks.task import Example, Task
from rayml.training import replicated


@pytest.fixture
def lm(tiny):
    module = load_base(tiny, "float32")
    return TaskLM(module, TaskLoRA(module, TARGETS, 4, alpha=8.0, last_layers=2))


@pytest.fixture
def rows(tokenizer):
    encoder = Encoder(tokenizer, "{input}\nLabel:", 64)
    return [row for task in toy_tasks(2) for row in encoder.rows(task.examples, is_label=True)]


@pytest.mark.parametrize("packs", [False, True])
def test_losses_and_gradients_are_those_of_whole_forwards(lm, rows, tokenizer, packs):
    start = perturbed_start(lm)
    labels = [[row.tokens[row.start :] for row in rows[:100:20]] for _ in range(2)]

    def found(known):
        lm.known = known
        batch = collate([rows[:9], rows[3:11]], tokenizer.eos_token_id, labels, packs)
        losses, gradients = task_gradients(lambda fast: lm.losses(fast, batch), expand(start, 2))
        return batch, [losses, *gradients.values()]

    whole, expected = found(None)
    known = compute_known_states(lm, rows, tokenizer.eos_token_id)
    looked_up, same = found(known)
    torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-6)
    states = known.of(looked_up)
    for row, begin, tokens in whole.examples:
        kept = slice(begin, begin + len(tokens))
        torch.testing.assert_close(states[row, kept], whole.frozen[0][row, kept], rtol=1e-4, atol=1e-5)


def test_the_layers_are_not_run_for_what_is_known(lm, rows, tokenizer):
    lm.known = compute_known_states(lm, rows, tokenizer.eos_token_id)
    calls = []
    for index, layer in enumerate(lm.module.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.append(index))
    lm.losses(expand(perturbed_start(lm), 1), collate([rows[:4]], tokenizer.eos_token_id))
    assert calls == [2, 3]


def test_a_batch_with_an_unknown_example_is_run_as_a_whole(lm, rows, tokenizer):
    lm.known = compute_known_states(lm, rows[:8], tokenizer.eos_token_id)
    assert lm.known.of(collate([rows[:8]], tokenizer.eos_token_id)) is not None
    assert lm.known.of(collate([rows[:9]], tokenizer.eos_token_id)) is None
    assert lm.slot(collate([rows[:9]], tokenizer.eos_token_id)) == []


TEXT = Task("t", tuple(Example(f"say {n}", f"it is {n}") for n in range(8)))


@pytest.mark.parametrize("name", ["labels", "letters", "texts", "names", "masked", "masked without an end"])
def test_what_is_known_is_what_episodes_read(tmp_path, name):
    base = "tiny-masked" if name.startswith("masked") else "tiny"
    readout = {"readout": "prototypes", "label_names": 2} if name == "names" else {}
    changes = {"model": {"name": base}, "algorithm": {"name": "fomaml", **readout}}
    changes["data"] = {"labels": "words" if name in ("labels", "names") else "letters", "prompt": "{{ input }}:"}
    config, tokenizer = make_config(tmp_path, **changes), load_tokenizer(resolve_model(base))
    if name == "masked without an end":
        tokenizer.backend_tokenizer.post_processor = Sequence([])
    module = load_base(resolve_model(base), "float32")
    targets = ["query"] if base == "tiny-masked" else TARGETS
    lm = TaskLM(module, TaskLoRA(module, targets, 4, alpha=8.0, last_layers=2))
    encoder, task = config.encoder(tokenizer), TEXT if name == "texts" else toy_tasks(1)[0]
    rows = replicated.task_rows(encoder.for_task(task.name, task.kind), task, config.data.labels)
    known = compute_known_states(lm, rows, encoder.pad)
    episode = encoder.episode(config.data.sampler(0).episode([task], 0))
    for side in training_sides(lm, [episode], encoder.pad, config):
        side.losses(expand(perturbed_start(lm), 1))
        found, wanted = known.of(side.batch), side.batch.frozen[0]
        for row, begin, tokens in side.batch.examples:
            read = slice(begin, begin + len(tokens))
            torch.testing.assert_close(found[row, read], wanted[row, read], rtol=1e-4, atol=1e-5)
    if name == "texts":  # not every prefix of theirs: those took memory by the square of their length
        assert len(known.first) == len(TEXT.examples)


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_workers_share_the_work_and_find_the_same(lm, tokenizer, workers, monkeypatch):
    monkeypatch.setattr("rayml.lm.frozen.BLOCK_TOKENS", 40)
    rows = [TokenRow([5 + n % 7] * (4 + n % 5) + [9], 4 + n % 5) for n in range(23)]
    alone = compute_known_states(lm, rows, tokenizer.eos_token_id)
    parts = [lm.frozen_states(block, tokenizer.eos_token_id) for block in blocks(rows)[1]]
    assert len(parts) > workers or workers == 9
    parts += [alone.states[:0]] * (-len(parts) % workers)  # in the last turn, some have nothing to do
    for rank in range(workers):
        turns = iter(range(0, len(parts), workers))

        def gather(mine, rank=rank, turns=turns):
            of_all = parts[(first := next(turns)) : first + workers]
            assert torch.equal(mine, of_all[rank])
            return of_all

        together = compute_known_states(lm, rows, tokenizer.eos_token_id, WorkerShare(rank, workers, gather))
        assert torch.equal(together.states, alone.states)
        assert together.first == alone.first
        assert next(turns, None) is None


def test_states_in_a_file_are_those_in_memory_and_leave_nothing_behind(lm, rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    batch = collate([rows[:9], rows[3:11]], tokenizer.eos_token_id, packs=True)
    inside = compute_known_states(lm, rows, tokenizer.eos_token_id)
    monkeypatch.setattr(replicated, "MOST_IN_MEMORY", 1000)
    room = replicated.room_for_states
    outside = compute_known_states(lm, rows, tokenizer.eos_token_id, room=room)
    mapped = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else str(tmp_path)
    assert str(tmp_path) in mapped
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(outside.of(batch), inside.of(batch))
    monkeypatch.setattr(replicated, "MOST_IN_FILE", 2000)
    assert compute_known_states(lm, rows, tokenizer.eos_token_id, room=room) is None
    monkeypatch.setattr(replicated, "MOST_IN_FILE", 2**30)
    monkeypatch.setattr(replicated, "has_disk_for", lambda _: False)
    assert compute_known_states(lm, rows, tokenizer.eos_token_id, room=room) is None


@pytest.mark.parametrize(("kind", "free", "fits"), [("ext4", 201, True), ("ext4", 200, False), ("tmpfs", 201, False)])
def test_a_disk_has_room_twice_over_and_is_no_memory(tmp_path, monkeypatch, kind, free, fits):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = SimpleNamespace(mountpoint=str(tmp_path), fstype=kind)
    mounts = [SimpleNamespace(mountpoint="/", fstype="overlay"), own]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    assert replicated.has_disk_for(100) is fits


def test_layers_may_be_wider_than_the_embeddings(tmp_path):
    module = load_base(str(make_model(tmp_path, "opt", word_embed_proj_dim=16)), "float32")
    lm = TaskLM(module, TaskLoRA(module, ["q_proj"], 2, alpha=4.0, last_layers=1))
    rows = [TokenRow([5, 6, 7 + n], 2) for n in range(4)]
    known = compute_known_states(lm, rows, 1)
    batch = collate([rows], 1)
    lm.losses(None, batch)
    torch.testing.assert_close(known.of(batch), batch.frozen[0])
    assert known.states.shape[1] != module.get_input_embeddings().embedding_dim


def test_blocks_hold_each_row_once_whatever_their_order(rows):
    unique, parts = blocks(rows + rows)
    assert [row for block in parts for row in block] == unique
    assert len(unique) == len({tuple(row.tokens) for row in rows})
    assert blocks(rows[::-1])[0] == unique
    assert all(len(block) * len(block[-1].tokens) <= BLOCK_TOKENS for block in parts)
