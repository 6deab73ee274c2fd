"""Prompts: Jinja templates by kind and task, several at once, and ways to score options; each against plain sums."""

from dataclasses import replace

import pytest
import torch
from conftest import make_config, perturbed_start, tiny_lm
from transformers import AutoModelForCausalLM

from rayml.algorithms.inner_loop import expand
from rayml.errors import ConfigError, DataError
from rayml.lm.check_tasks import check_tasks
from rayml.lm.encode import CHANNEL, Encoder
from rayml.lm.option_scoring import PromptEnsemble, weighted_prompts
from rayml.tasks.task import Example, Task
from rayml.tasks.templates import compile_template, render

OPTIONS = ["red", "a blue one"]
TEXTS = ["sky at noon", "ripe tomato"]
EXAMPLES = [Example(text, "") for text in TEXTS]
PAIR = Example("a\nb", "yes", (("premise", "a"), ("hypothesis", "b")))


def encoder_of(tokenizer, **more) -> Encoder:
    return Encoder(tokenizer, "{input}:", 64, "vocabulary", **more)


def log_probs(tokenizer, model, prompt: str, target: str) -> torch.Tensor:
    """The log-probability of each token of a target behind a prompt, by the bare model, one row at a time."""
    start, tokens = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + target)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return torch.stack([logits[index - 1, tokens[index]] for index in range(start, len(tokens))])


REFERENCE = {
    "mean": lambda say, text, option: say(f"{text}:", f" {option}").mean(),
    "sum": lambda say, text, option: say(f"{text}:", f" {option}").sum(),
    "pmi": lambda say, text, option: say(f"{text}:", f" {option}").sum() - say(":", f" {option}").sum(),
    "channel": lambda say, text, option: say(CHANNEL.format(option), f" {text}").sum(),
}


@pytest.mark.parametrize("scoring", REFERENCE)
def test_options_score_by_their_formula(scoring, tiny, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    encoder = encoder_of(tokenizer, scoring=scoring)
    lm = tiny_lm(tiny)
    (found,) = PromptEnsemble(lm, encoder.pad, [weighted_prompts(lm, encoder, EXAMPLES, OPTIONS)]).log_probs(None)

    def say(prompt: str, target: str) -> torch.Tensor:
        return log_probs(tokenizer, model, prompt, target)

    wanted = torch.tensor([[REFERENCE[scoring](say, text, option) for option in OPTIONS] for text in TEXTS])
    assert torch.allclose(found, wanted.log_softmax(-1), atol=1e-4)


def test_an_ensemble_averages_log_probabilities_and_tasks_may_have_fewer_prompts(tiny, tokenizer):
    lm, prompts = tiny_lm(tiny), ("{input}:", "Q: {{ input }} A:", "so {{ input|upper }} is")
    several = replace(encoder_of(tokenizer), ensemble=prompts[1:])
    weights = expand(perturbed_start(lm), 2)
    first, second = PromptEnsemble(
        lm, several.pad, [weighted_prompts(lm, one, EXAMPLES, OPTIONS) for one in (several, encoder_of(tokenizer))]
    ).log_probs(weights)
    alone = []
    for prompt in prompts:
        encoder = replace(encoder_of(tokenizer), prompt=prompt)
        ensemble = PromptEnsemble(lm, encoder.pad, [weighted_prompts(lm, encoder, EXAMPLES, OPTIONS)])
        alone += ensemble.log_probs({name: weight[:1] for name, weight in weights.items()})
    assert torch.allclose(first, torch.stack(alone).mean(0).log_softmax(-1), atol=1e-5)
    assert torch.allclose(second, alone[0], atol=1e-5)
    assert not torch.allclose(first, second, atol=1e-3)


def test_a_tasks_own_template_comes_before_its_kinds_and_that_before_the_prompt(tokenizer, tmp_path):
    templates = {"pair": "{{ premise }} / {{ hypothesis }} ->", "hotel-*": ["H {{ input }}:", "or {{ input }}:"]}
    encoder = make_config(tmp_path, data={"templates": templates}).encoder(tokenizer)
    assert encoder.for_task("other", "pair").prompt == "{{ premise }} / {{ hypothesis }} ->"
    hotel = encoder.for_task("hotel-rome", "label")
    assert (hotel.prompt, hotel.ensemble) == ("H {{ input }}:", ("or {{ input }}:",))
    assert encoder.for_task("other", "label").prompt == "{input}\nLabel:"
    assert encoder.for_task("other", "summary").prompt == "{{ input }}\nSummary:"


def test_templates_put_texts_together():
    assert render("{% for name, text in parts %}{{ name }}={{ text }} {% endfor %}", PAIR) == "premise=a hypothesis=b "
    assert render("{% if context is defined %}{{ context }}{% else %}{{ premise|upper }}{% endif %}", PAIR) == "A"
    assert render("{input}!", Example("{{ 7 * 7 }}", "")) == "{{ 7 * 7 }}!"  # a text is no template
    with pytest.raises(DataError, match="'context' is undefined; there are input, parts, premise, hypothesis"):
        render("{{ context }}", PAIR)
    with pytest.raises(DataError, match=r"template .*truncate"):
        render("{{ premise | truncate('ten') }}", PAIR)


@pytest.mark.parametrize(
    "template",
    [
        "no input",
        "{{ input",
        "{{ input.__class__ }}",
        "{{ input * 99999999 }}",
        "{{ [input] }}",
        "{{ input|replace('a', 'b') }}",
        "{{ range(9) }}",
        "{% for a in input %}{{ a }}{% endfor %}",
        "{% for a, b in parts %}{% for c, d in parts %}{{ a }}{% endfor %}{% endfor %}",
        "{% set x = input %}{{ x }}",
        "{% include 'x' %}{{ input }}",
        "{% macro m() %}{{ input }}{% endmacro %}{{ m() }}",
    ],
)
def test_templates_that_are_programs_or_show_nothing_are_refused(template):
    with pytest.raises(ConfigError, match="template"):
        compile_template(template)


def test_templates_are_checked_against_the_tasks_before_a_run(tokenizer):
    task = Task("nli", (PAIR,), ("yes", "no"), "pair")
    encoder = encoder_of(tokenizer, templates=(("pair", ("{{ premise }}:", "{{ wrong }}:")),))
    with pytest.raises(DataError, match=r"task 'nli': template '{{ wrong }}:'"):
        check_tasks(encoder, [task])
    check_tasks(encoder_of(tokenizer, templates=(("pair", ("{{ premise }}:",)),)), [task])
