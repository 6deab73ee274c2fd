"""Sentence encoders as the base: the vectors of sentence-transformers, and the adapters and inner loop of others."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from conftest import SPLITS, make_config, on_workers, perturbed_start, toy_tasks
from safetensors.torch import load_file, save_file
from sentence_encoders import BERT_TARGETS, write_encoder
from serving_run import TEXTS as SERVED
from serving_run import TICKETS, ask, learn, make_run, request
from test_classifiers import topics
from test_compare import REQUEST

import rayml
from rayml.algorithms.inner_loop import InnerLoop, expand
from rayml.algorithms.prototypes import MEANS, prototypes
from rayml.algorithms.registry import parse_algorithm
from rayml.config import Config
from rayml.errors import ConfigError, DataError
from rayml.experiments.classifiers import install_command
from rayml.experiments.method_runs import plan, seconds_per_token
from rayml.lm import zero
from rayml.lm.abilities import check_model
from rayml.lm.batch import collate
from rayml.lm.catalog import resolve_model
from rayml.lm.encode import Encoder, class_numbers
from rayml.lm.load import load_base, load_tokenizer
from rayml.lm.lora import TaskLoRA
from rayml.lm.model import TaskLM
from rayml.lm.peft_files import READOUT
from rayml.lm.pooling import SIMILARITY
from rayml.lm.queries import answer_queries
from rayml.lm.rows import decode_rows
from rayml.lm.scorer import EpisodeQueries
from rayml.lm.sentence import INPUT, sentence_row, sentences_of
from rayml.lm.sides import TaskSide
from rayml.model import untrained_model
from rayml.planning.shape import read_shape
from rayml.runs.files import parse_path
from rayml.serving.adapter_files import PLAIN_CARD
from rayml.serving.replica import Replica
from rayml.serving.settings import Serving
from rayml.tasks.episodes import EVALUATION_SEED, Episode, Sampler
from rayml.tasks.prepare import prepare_splits
from rayml.tasks.task import Example
from rayml.training import collective
from rayml.training.driver import train

TEXTS = ["I was charged twice", "why?", "The App crashes at START, and the page stays blank. " * 9, "ok"]
LIBRARY = install_command("embedding", "minilm")
needs_library = pytest.mark.skipif(bool(LIBRARY), reason=f"sentence-transformers is not installed: {LIBRARY}")
PROMPTED = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
FOLDERS = {
    "mean": {},
    "not unit": {"is_unit": False},
    "cls": {"pooling": {"pooling_mode_cls_token": True}},
    "max": {"pooling": {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}},
    "sqrt": {"pooling": {"pooling_mode_mean_sqrt_len_tokens": True}, "is_unit": False},
    "weighted": {"pooling": {"pooling_mode_weightedmean_tokens": True}},
    "both": {"pooling": {"pooling_mode": ["cls", "mean"]}},
    "prompt": {"told": PROMPTED},
    "short": {"reading": {"max_seq_length": 16}},
    "lower case": {"reading": {"do_lower_case": True}},
    "last token": {"pooling": {"pooling_mode": "lasttoken"}, "is_causal": True},
}


def encoder_config(folder, model, **changes) -> Config:
    values = {
        "model": {"name": model, "dtype": "float32"},
        "algorithm": {"name": "protonet"},
        "lora": {"rank": 4, "targets": BERT_TARGETS},
        "data": {"splits": SPLITS, "labels": "words"},
        "outer": {"steps": 3, "lr": 1e-3},
        "validation": {"every": 3, "episodes": 4},
        "run": {"checkpoint_every": 2},
    }
    return make_config(folder, **values | changes)


def vectors(model: rayml.MetaModel, texts, weights=None):
    """What rayml makes of texts, `[N, D]`."""
    episode = Sampler(2, 1, 1, "words", 0).episode([topics()], 0)
    episode = replace(episode, query=tuple(replace(episode.query[0], input=text) for text in texts))
    queries = EpisodeQueries(model.lm, model.encoder, [episode], model.config.algorithm).queries
    with torch.no_grad():
        return model.lm.vectors(weights, queries._prompts)[0]


def nearest_name(model: rayml.MetaModel, texts, labels, weights=None) -> list[str]:
    """The label whose own text is nearest to each text."""
    own, names = (torch.nn.functional.normalize(vectors(model, of, weights), dim=-1) for of in (texts, labels))
    return [labels[index] for index in torch.cdist(own, names).argmin(1).tolist()]


@needs_library
@pytest.mark.parametrize("name", ["minilm", *FOLDERS])
def test_a_vector_is_that_of_the_library(tmp_path, name):
    from sentence_transformers import SentenceTransformer

    lora = {"start": "random", "targets": ["q_proj"] if name == "last token" else BERT_TARGETS}
    folder = write_encoder(tmp_path / "encoder", **FOLDERS[name]) if name in FOLDERS else resolve_model(name)
    model = untrained_model(encoder_config(tmp_path, folder, lora=lora), toy_tasks())
    wanted = SentenceTransformer(folder, device="cpu").encode(TEXTS, convert_to_tensor=True)
    found = vectors(model, TEXTS)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert len({tuple(v.tolist()) for v in found}) == len(TEXTS)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_text_is_cut_as_the_tokenizer_would_whatever_limit_another_thread_has(tmp_path, is_causal):
    """A server's requests are read side by side: when they cut by the tokenizer's own limit, some had another's."""
    words = load_tokenizer(write_encoder(tmp_path / "encoder", is_causal=is_causal))
    sentences = sentences_of(words)
    rows = {limit: sentence_row(words, sentences, TEXTS[2] * 2, limit).tokens for limit in (3, 16, 100, 1 << 30)}
    assert words.backend_tokenizer.truncation is None
    for limit, tokens in rows.items():
        assert tokens == words(TEXTS[2] * 2, truncation=True, max_length=min(limit, 128))["input_ids"]


def test_a_text_is_cut_to_the_models_context_where_nothing_else_limits_it(tmp_path):
    folder = write_encoder(tmp_path / "encoder", reading={"max_seq_length": None})
    own = encoder_config(tmp_path, folder, data={"max_tokens": 1024, "labels": "words"}).encoder(load_tokenizer(folder))
    row = own.row(Example("a" * 2000, ""), is_label=True)
    assert len(row.tokens) == 512
    lm = TaskLM(load_base(folder, "float32"), None)
    assert lm.vectors(None, collate([[row]], own.pad)).isfinite().all()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def encoder_lm(folder, last_layers=None) -> TaskLM:
    module = load_base(folder, "float32")
    return TaskLM(module, TaskLoRA(module, BERT_TARGETS, 4, alpha=8.0, last_layers=last_layers))


@needs_library
@pytest.mark.parametrize(("is_causal", "last_layers"), [(False, None), (False, 2), (True, None)])
def test_an_adapter_loads_in_sentence_transformers(tmp_path, is_causal, last_layers):
    from sentence_transformers import SentenceTransformer

    pooling = {"pooling_mode": "lasttoken" if is_causal else "mean"}
    encoder = write_encoder(tmp_path / "encoder", pooling, is_causal=is_causal)
    lora = {"rank": 4, "targets": ["q_proj", "down_proj"] if is_causal else BERT_TARGETS, "last_layers": last_layers}
    model = untrained_model(encoder_config(tmp_path, encoder, lora=lora), toy_tasks())
    start = perturbed_start(model.lm)
    replace(model, start=start).save(tmp_path / "start")
    stock = SentenceTransformer(encoder, device="cpu")
    bare = stock.encode(TEXTS, convert_to_tensor=True)
    stock.load_adapter(str(tmp_path / "start"))
    wanted = stock.encode(TEXTS, convert_to_tensor=True)
    found = vectors(model, TEXTS, {name: weight[None] for name, weight in start.items()})
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (wanted - bare).abs().max() > 1e-2


@pytest.mark.parametrize("last_layers", [None, 2])
def test_tasks_side_by_side_have_the_vectors_and_the_gradients_that_each_has_alone(tmp_path, encoder, last_layers):
    """Also where the others' texts are longer or more, and where the frozen layers have seen the batch before."""
    lm, own = encoder_lm(encoder, last_layers), encoder_config(tmp_path, encoder).encoder(load_tokenizer(encoder))
    tasks = [
        [own.row(example, True) for example in topics().examples[first : first + n]] for first, n in ((0, 5), (6, 2))
    ]
    starts = [perturbed_start(lm, seed) for seed in (1, 2)]
    side_by_side = {n: torch.stack([start[n] for start in starts]).requires_grad_() for n in starts[0]}
    batch = collate(tasks, own.pad)
    for _ in range(2):
        together = lm.states(side_by_side, batch)
        gradients = torch.autograd.grad(
            (together[0].sum(0) ** 3).sum() + (together[1, :2].sum(0) ** 3).sum(), list(side_by_side.values())
        )
        for t, (rows, start) in enumerate(zip(tasks, starts, strict=True)):
            fast = {name: weight[None].clone().requires_grad_() for name, weight in start.items()}
            alone = torch.cat([lm.states(fast, collate([[row]], own.pad))[0] for row in rows])
            torch.testing.assert_close(together[t, : len(rows)], alone, atol=1e-5, rtol=0)
            wanted = torch.autograd.grad((alone.sum(0) ** 3).sum(), list(fast.values()))
            for found, of in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(found[t], of[0], atol=1e-4, rtol=1e-4)
    assert bool(batch.frozen) == bool(last_layers)


def test_a_sentence_encoder_is_trained_evaluated_and_asked(tmp_path, encoder, local_mode):
    regularize = {"lora_dropout": 0.1, "token_dropout": 0.1}
    lora = {"rank": 4, "targets": BERT_TARGETS, "last_layers": 2}
    algorithm = {"name": "proto_maml", "readout": "prototypes", "label_names": 2, "prototype_steps": 0}
    run = train(encoder_config(tmp_path, encoder, algorithm=algorithm, regularize=regularize, lora=lora))
    assert 0 <= run.records()[-1]["val_accuracy_after"] <= 1
    found = rayml.evaluate(run.path, episodes=4)["overall"]
    model = rayml.load(run.path)
    sampler, tasks = model.config.data.sampler(EVALUATION_SEED), prepare_splits(model.config.data).test
    start = {name: weight[None] for name, weight in model.start.items()}
    before = []
    for episode in (sampler.episode([task], index) for task in tasks for index in range(4)):
        nearest = nearest_name(model, [example.input for example in episode.query], list(episode.labels), start)
        before.append(fmean(map(str.__eq__, nearest, [example.target for example in episode.query])))
    assert found["before"]["mean"] == pytest.approx(fmean(before))  # the labels' own texts are all that it has
    task = toy_tasks(tasks=1, classes=4, per_class=5, seed=9)[0]
    adapter = model.adapt([(example.input, example.target) for example in task.examples])
    answers = adapter.predict([example.input for example in task.examples])
    adapter.save(tmp_path / "mine")
    again = rayml.load_adapter(tmp_path / "mine").predict([example.input for example in task.examples])
    # A plain nearest mean, from the vectors alone, where a label's own text counts as up to two examples.
    learned, labels = {name: weight[None] for name, weight in adapter.weights.items()}, list(task.options)
    texts, targets = [e.input for e in task.examples], [e.target for e in task.examples]
    own, names = (torch.nn.functional.normalize(vectors(model, of, learned), dim=-1) for of in (texts, labels))
    sums = torch.stack([own[[target == label for target in targets]].sum(0) for label in labels])
    right = sum(map(str.__eq__, nearest_name(model, texts, labels, learned), targets))
    worth = 2 * max(0.0, ((right + 1.6) / (len(texts) + 2) - 1 / 4) / (1 - 1 / 4))
    assert 0.05 < worth < 2
    means = (sums + worth * names) / (5 + worth)
    scale = adapter.weights["readout.scale"].exp()
    wanted = (-scale * torch.cdist(own, means) ** 2).softmax(-1)
    for one, other, row in zip(answers, again, wanted, strict=True):
        assert one.probabilities == pytest.approx(dict(zip(labels, row.tolist(), strict=True)), abs=1e-4)
        assert other.probabilities == pytest.approx(one.probabilities, abs=1e-5)


def test_one_shot_can_be_learned_from_beside_the_labels_own_texts(tmp_path, encoder):
    """Without them no example has another of its class, and nothing is learned; nor where they are codes or letters."""

    def learns(label_names: int, scheme: str, labels: tuple[str, str]) -> bool:
        algorithm = {"name": "proto_maml", "readout": "prototypes", "label_names": label_names}
        data = {"splits": SPLITS, "labels": scheme}
        config = encoder_config(tmp_path, encoder, algorithm=algorithm, data=data)
        model = untrained_model(config, prepare_splits(config.data).train)
        adapter = model.adapt(list(zip(("red as a rose", "blue as the sea"), labels, strict=True)))
        return not all(torch.equal(weight, model.start[n]) for n, weight in adapter.weights.items() if "lora" in n)

    colours = "red", "blue"
    assert learns(1, "words", colours)
    assert not learns(0, "words", colours)
    assert not learns(1, "letters", colours)
    assert not learns(1, "words", ("K27", "X4"))


@pytest.mark.parametrize("steps", [0, 5])
def test_evaluation_answers_as_an_adapter_does(tmp_path, encoder, steps):
    algorithm = {"name": "proto_maml", "readout": "prototypes", "label_names": 3, "prototype_steps": steps}
    config = encoder_config(tmp_path, encoder, algorithm=algorithm)
    model, task = untrained_model(config, toy_tasks()), toy_tasks(tasks=1, classes=3, per_class=6, seed=9)[0]
    episode, scorer = config.data.sampler(EVALUATION_SEED).episode([task], 0), model.scorer()
    *_, outputs = scorer.outputs(scorer.prepare([episode]), model.start, model.inner_lrs, {0, scorer.steps})
    adapter = model.adapt([(example.input, example.target) for example in episode.support])
    answers = adapter.predict([example.input for example in episode.query])
    wanted = [[answer.probabilities[label] for label in episode.labels] for answer in answers]
    torch.testing.assert_close(outputs[0].exp(), torch.tensor(wanted), atol=1e-5, rtol=1e-4)
    support = scorer.prepare([episode]).support
    states = support.states(None)
    means = config.algorithm.prototypes.means_of(support, support.states(expand(adapter._forward_weights, 1))).means[0]
    learned = adapter.weights[MEANS][[list(adapter.labels).index(label) for label in episode.labels]]
    assert torch.allclose(learned, means, atol=1e-5) == (steps == 0)
    measured = config.algorithm.prototypes.means_of(support, states).counts
    assert (measured != prototypes(states, support.classes).counts).all()  # names that count as one would show nothing


def test_a_label_without_an_example_is_no_answer_though_its_text_is_read(tmp_path, encoder):
    config = encoder_config(
        tmp_path, encoder, algorithm={"name": "proto_maml", "readout": "prototypes", "label_names": 3}
    )
    model = untrained_model(config, toy_tasks())
    scorer = model.scorer()
    episode = config.data.sampler(EVALUATION_SEED).episode([toy_tasks(tasks=1, classes=3, per_class=6, seed=9)[0]], 0)
    missing = next(iter(episode.labels))
    episode = replace(episode, support=tuple(e for e in episode.support if e.target != missing))
    *_, (scores,) = scorer.outputs(scorer.prepare([episode]), model.start, model.inner_lrs, {0, scorer.steps})
    assert (scores[:, 0] == -torch.inf).all()
    assert scores[:, 1:].isfinite().all()


def test_the_prompt_is_the_text_as_it_is_unless_told_otherwise(tmp_path, encoder):
    tokenizer = load_tokenizer(encoder)
    example = topics().examples[0]
    plain = encoder_config(tmp_path, encoder).encoder(tokenizer)
    told = encoder_config(tmp_path, encoder, data={"prompt": "query: {{ input }}"}).encoder(tokenizer)
    for own, text in ((plain, example.input), (told, f"query: {example.input}")):
        for kind in ("", "pair", "label"):
            assert own.for_task("any", kind).row(example, True).tokens == tokenizer(text)["input_ids"]
    assert plain.ensemble_rows([example], ["a", "b", "c"])[0][1] == [[plain.row(example, True)]]


def test_what_needs_no_label_tokens_is_compared_and_planned(tmp_path, encoder):
    config = encoder_config(tmp_path, encoder, algorithm={"name": "proto_maml", "readout": "prototypes"})
    request = replace(REQUEST, methods=[], seeds=1)
    splits = prepare_splits(config.data)
    entries = plan(config.model_dump(mode="json"), "here", config, splits, request, parse_path(tmp_path / "all"))
    trained = {entry.name for entry in entries if entry.trains}
    assert trained >= {"multitask", "protonet", "reptile", "fomaml_plus", "proto_maml"}
    assert not {"zero_shot", "in_context", "metaicl"} & {entry.name for entry in entries}
    assert seconds_per_token(config, splits.train) > 0
    shape, module = read_shape(config), load_base(encoder, "float32")
    assert shape.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert shape.vocabulary == shape.tied_forward == 0


def test_what_a_sentence_encoder_cannot_do_is_refused(tmp_path, encoder):
    for changes, message in (
        ({"algorithm": {"name": "fomaml"}}, "algorithm.readout: .* is a sentence encoder, without label tokens"),
        ({"adapter": "soft_prompt"}, "mode, adapter: .* is a sentence encoder"),
        ({"lora": {"targets": ["q_proj"]}}, "lora.targets: q_proj is no linear layer of BertModel; it has dense, key"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_model(encoder_config(tmp_path, encoder, **changes), encoder, toy_tasks())
    types = "a.Transformer", "a.Pooling", "a.Dense"
    modules = [{"type": name, "path": str(number or "")} for number, name in enumerate(types)]
    folder = tmp_path / "dense"
    write_encoder(folder)
    for found, names in ((modules, "Transformer, Pooling, Dense"), ([{}], "None")):
        (folder / "modules.json").write_text(json.dumps(found))
        with pytest.raises(ConfigError, match=f"is made of {names}; rayml reads"):
            load_tokenizer(str(folder))
    (folder / "modules.json").unlink()
    assert load_base(str(folder), "float32").pooler is None  # a bare model: its mean is taken


TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    "given", [[("a", "x"), ("b", "x")], [{"input": "a", "target": "b c", "kind": "text"}], [{"messages": TALK}]]
)
def test_a_sentence_encoder_does_not_take_texts_to_write(tmp_path, encoder, given):
    config = encoder_config(tmp_path, encoder, algorithm={"name": "proto_maml", "readout": "prototypes"})
    model = untrained_model(config, prepare_splits(config.data).train)
    with pytest.raises(DataError, match=r"a sentence encoder writes no text.*two labels or more"):
        model.adapt(given)


def test_a_replica_answers_as_the_adapter_does(tmp_path, encoder):
    """Adapters of several tasks and the bare base in one batch."""
    changes = {"model": {"name": encoder, "dtype": "float32"}, "algorithm": {"name": "protonet"}}
    run = make_run(tmp_path, lora={"rank": 4, "targets": BERT_TARGETS}, data={"labels": "words"}, **changes)
    replica, model = Replica(Serving(run=str(run.path))), rayml.load(run.path)
    asyncio.run(replica.check(60))  # as Serve does before it sends anything
    manifests = learn(replica, request(name="one"), request(TICKETS[:4], name="two"))
    for manifest, pairs in zip(manifests, (TICKETS, TICKETS[:4]), strict=True):
        wanted = model.adapt(pairs).predict(SERVED)
        for answer, of in zip(ask(replica, manifest.id, SERVED), wanted, strict=True):
            assert answer["label"] == of.label
            assert answer["probabilities"] == pytest.approx(of.probabilities, abs=1e-4)
    # Without a task, texts are compared with the options' own texts.
    options = ["an invoice", "a parcel", "an error"]
    assert [answer["label"] for answer in ask(replica, None, SERVED, options=options)] == nearest_name(
        model, SERVED, options
    )
    # Requests with other options may share a batch.
    pair = [replica.bare.query(Example(SERVED[0], ""), labels) for labels in (options, ["red", "a parcel", "why"])]
    alone = [answer_queries(model.lm, model.encoder.pad, [query])[0] for query in pair]
    for together, wanted in zip(answer_queries(model.lm, model.encoder.pad, pair), alone, strict=True):
        torch.testing.assert_close(together, wanted, atol=1e-4, rtol=0)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_the_bare_encoder_answers_beside_adapters_of_its_algorithm_as_it_does_alone(tmp_path, encoder):
    config = encoder_config(tmp_path, encoder, algorithm={"name": "fomaml_plus", "readout": "prototypes"})
    model = untrained_model(config, prepare_splits(config.data).train)
    adapter, bare = model.adapt(TICKETS), model.adapter(None, PLAIN_CARD)
    pair = [of.query(Example(SERVED[0], ""), list(adapter.labels)) for of in (adapter, bare)]
    assert adapter.algorithm.can_share_batch(bare.algorithm)
    alone = [answer_queries(model.lm, model.encoder.pad, [query])[0] for query in pair]
    for together, wanted in zip(answer_queries(model.lm, model.encoder.pad, pair), alone, strict=True):
        torch.testing.assert_close(together, wanted, atol=1e-4, rtol=0)


def meta_gradient_of(folder, lm, tasks):
    """Summed over these tasks and all workers: by proto_maml through prototypes alone."""
    algorithm, tokenizer = parse_algorithm({"name": "proto_maml", "readout": "prototypes"}), load_tokenizer(folder)
    start = perturbed_start(lm) | algorithm.prototypes.start()
    inner_lrs = {name: torch.tensor(0.5) for name in start if "lora" in name}
    encoder, sampler = Encoder(tokenizer, INPUT, 64), Sampler(2, 2, 2, "words", 0)
    episodes = [sampler.episode([topics()], index) for index in tasks]
    sides = [
        TaskSide(
            lm,
            [encoder.rows(getattr(episode, side), True) for episode in episodes],
            [[] for _ in episodes],
            [class_numbers(episode, side) for episode in episodes],
            encoder.pad,
        )
        for side in ("support", "query")
    ]
    found = algorithm.meta_gradient(
        *sides, start, InnerLoop(inner_lrs, 2, learns_inner_lrs=True), torch.ones(len(episodes))
    )
    return collective.sum_over_workers([*found.start.values(), *found.inner_lrs.values(), found.query_losses.sum()])


def zero_worker(rank, folder, expected):
    module = zero.load(folder, "float32", "sdpa", torch.device("cpu"), whole_below=0)
    assert all(parameter.numel() == 0 for parameter in module.parameters())
    lm = TaskLM(module, TaskLoRA(module, BERT_TARGETS, 4, alpha=8.0))
    for found, wanted in zip(meta_gradient_of(folder, lm, (2 * rank, 2 * rank + 1)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.workers
def test_a_sharded_sentence_encoder_learns_as_a_whole_one(encoder):
    pytest.importorskip("deepspeed")
    expected = meta_gradient_of(encoder, encoder_lm(encoder), range(4))
    assert all(part.abs().max() > 0 for part in expected)
    on_workers(zero_worker, 2, encoder, [part.clone() for part in expected])


def test_a_language_model_of_the_hub_s_cache_loads_without_a_network(tmp_path, tiny):
    """Where nobody can say that there is no `modules.json`."""
    hub = tmp_path / "hub" / "models--someone--llm"
    shutil.copytree(tiny, hub / "snapshots" / "abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    code = (
        "from rayml.lm.load import load_base, load_tokenizer as t\n"
        "print(t('someone/llm').is_fast, load_base('someone/llm', 'float32').dtype)"
    )
    own = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    printed = subprocess.run([sys.executable, "-c", code], env=os.environ | own, capture_output=True, text=True)
    assert printed.stdout == "True torch.float32\n", printed.stderr


PAIRS = [
    ({"one": "red car", "other": "a car"}, "same"),
    ({"one": "blue", "other": "the sea"}, "same"),
    ({"one": "x y", "other": "q"}, "no"),
    ({"one": "u", "other": "v"}, "no"),
]


def test_the_similarity_of_a_pair_stands_beside_its_vector(encoder):
    """By the bare encoder, whatever the weights; zero for what is no pair, also in one batch with pairs."""
    model, reads = encoder_lm(encoder), Encoder(load_tokenizer(encoder), INPUT, 64)
    weights = expand(perturbed_start(model), 2)
    examples = [Example(" ".join(given.values()), label, tuple(given.items())) for given, label in PAIRS]
    plain = reads.rows([Example(text, "a") for text in ("red car", "a car", "blue")], True)
    side = TaskSide(model, [reads.rows(examples, True), plain], [(), ()], [[0, 0, 1, 1], [0, 1, 0]], reads.pad)
    states = side.states(weights)
    vectors = torch.nn.functional.normalize(model.vectors(weights, side.batch), dim=-1)
    torch.testing.assert_close(states[..., :-1], vectors)
    for number, (given, _) in enumerate(PAIRS):
        texts = collate([reads.rows([Example(text, "a") for text in given.values()], True)], reads.pad)
        one, other = model.vectors(None, texts)[0]
        expected = SIMILARITY * torch.nn.functional.cosine_similarity(one, other, dim=0)
        torch.testing.assert_close(states[0, number, -1], expected, rtol=1e-4, atol=1e-4)
    assert not states[1, :, -1].any()
    episode = Episode(0, "t", tuple(examples), tuple(examples[:1]), {"same": "same", "no": "no"}, "pair")
    record = reads.episode(episode)  # as Ray Data carries it to the workers
    assert decode_rows(record["support"]) == reads.rows(examples, True)
    torch.testing.assert_close(model.states(weights, side.batch.to(torch.device("cpu"))), states)


def test_pairs_are_learned_saved_and_asked(tmp_path, encoder):
    """Prototypes that were kept before texts of pairs were compared have one number less, and still answer."""
    algorithm = {"name": "proto_maml", "readout": "prototypes", "prototype_steps": 0}
    model = untrained_model(encoder_config(tmp_path, encoder, algorithm=algorithm), toy_tasks())
    adapter = model.adapt(PAIRS, steps=0)
    means = adapter.weights[MEANS]
    assert means[:, -1].abs().min() > 0
    adapter.save(tmp_path / "pairs")
    asked = [given for given, _ in PAIRS]
    wanted = [answer.probabilities for answer in adapter.predict(asked)]
    assert [answer.probabilities for answer in rayml.load_adapter(tmp_path / "pairs").predict(asked)] == [
        pytest.approx(some, abs=1e-5) for some in wanted
    ]
    texts = model.adapt([("a", "x"), ("b", "y"), ("c", "x")], steps=0)
    assert not texts.weights[MEANS][:, -1].any()
    texts.save(tmp_path / "texts")
    readout = load_file(tmp_path / "texts" / READOUT)
    save_file(readout | {MEANS: readout[MEANS][:, :-1].contiguous()}, tmp_path / "texts" / READOUT)
    before = rayml.load_adapter(tmp_path / "texts").predict("a").probabilities
    assert before == pytest.approx(texts.predict("a").probabilities, abs=1e-6)
