"""Scores, intervals and summaries of a comparison."""

import random
import statistics
from collections import Counter

import numpy as np
import pytest

from rayml.compression.measure import compare_scores
from rayml.experiments.evaluate import EpisodeAnswers, Evaluation
from rayml.experiments.metrics import BINS, calibration_error, label_scores, text_scores
from rayml.experiments.report import as_html, markdown_table, plot_adaptation, scores_table
from rayml.experiments.summaries import summarize, summarize_evaluation
from rayml.tasks.statistics import Curve, interval, intervals


def test_an_interval_over_equal_values_has_no_width():
    assert interval(np.full((2, 3, 4), 0.5)) == {"mean": 0.5, "low": 0.5, "high": 0.5}


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1), (2,)])
def test_seeds_tasks_and_episodes_are_each_drawn_anew(shape):
    """Of two values, both draws are the same one a quarter of the time each: the interval is from one to the other."""
    assert interval(np.array([0.0, 1.0]).reshape(shape)) == {"mean": 0.5, "low": 0.0, "high": 1.0}


def test_an_interval_over_many_tasks_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(size=(1, 400, 1))
    found = interval(values)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    # Tasks are what is drawn: a hundred copies of each episode tell nothing new.
    assert interval(np.repeat(values, 100, axis=2)) == pytest.approx(found, abs=0.02)


def drawn_by_hand(values) -> dict[str, float]:
    """A hierarchical bootstrap of `[seeds][tasks][episodes]`, one draw after the other."""
    rng, means = random.Random(1), []
    tasks, episodes = range(len(values[0])), range(len(values[0][0]))
    for _ in range(4000):
        seeds = rng.choices(values, k=len(values))
        drawn = [(task, rng.choice(episodes)) for task in rng.choices(tasks, k=len(tasks)) for _ in episodes]
        means.append(statistics.mean(seed[task][episode] for seed in seeds for task, episode in drawn))
    cuts = statistics.quantiles(means, n=40)
    return {"mean": statistics.mean(means), "low": cuts[0], "high": cuts[-1]}


@pytest.mark.parametrize("shape", [(3, 5, 4), (5, 4), (12,)])
def test_an_interval_is_that_of_a_plain_bootstrap(shape):
    values = np.random.default_rng(2).random(shape)
    nested = values.reshape((1, 1, 1, *shape)[-3:]).tolist()
    assert interval(values) == pytest.approx(drawn_by_hand(nested), abs=0.02)


def test_quantities_that_are_resampled_together_have_the_intervals_that_each_has_alone():
    values = np.random.default_rng(3).random((2, 3, 4, 5))
    for one, found in zip(values, intervals(values), strict=True):
        assert found == pytest.approx(interval(one))


def curves(scores: dict[str, list[float]], before: float = 0.25) -> list[Curve]:
    return [Curve(task, index, True, [before, score]) for task, of in scores.items() for index, score in enumerate(of)]


def test_the_headline_of_an_evaluation_is_over_tasks_and_a_task_is_over_its_episodes():
    """Three tasks of which one gains much: many episodes of each make no gain on a fourth any surer."""
    rng = np.random.default_rng(4)
    trained = {f"t{n}": (mean + 0.02 * rng.random(200)).tolist() for n, mean in enumerate((0.2, 0.2, 0.8))}
    found = summarize_evaluation(
        Evaluation(curves(trained), curves(dict.fromkeys(trained, [0.2] * 200)), answered(trained))
    )
    assert found["overall"]["episodes"] == 600
    over_untrained = found["overall"]["over_untrained"]
    assert over_untrained == pytest.approx({"mean": 0.21, "low": 0.01, "high": 0.61}, abs=0.01)
    assert all(of["after"]["high"] - of["after"]["low"] < 0.01 for of in found["tasks"].values())
    apart = compare_scores(curves(dict.fromkeys(trained, [0.2] * 200)), curves(trained))
    assert apart["difference"] == pytest.approx(over_untrained)
    caption = scores_table(found, "").caption
    assert "3 tasks and their episodes" in str(caption)


def test_many_tasks_of_any_name_are_plotted(tmp_path, monkeypatch):
    monkeypatch.setattr("rayml.experiments.report.MOST_PANELS", 4)
    names = "from $5_ to $9^", "b", "c", "d", "e"
    both = curves({name: [0.5, 0.75] for name in names})
    drawn = []
    monkeypatch.setattr("rayml.experiments.report.save_figure", lambda figure, path: drawn.append(figure))
    plot_adaptation(summarize_evaluation(Evaluation(both, both, answered(names))), tmp_path / "a.png", "a title")
    (figure,) = drawn
    assert len(figure.axes) == 4
    figure.savefig(tmp_path / "a.png")  # this is where mathematics would be read


def test_a_bar_in_a_tasks_name_ends_no_cell_of_a_report(tmp_path):
    page = as_html(markdown_table([["task", "lora"], ["bbq|age", "0.50"]]), tmp_path)
    assert "<td>bbq|age</td>\n<td>0.50</td>" in page


def answered(tasks) -> list[EpisodeAnswers]:
    one = [{"target": "yes", "answer": "yes", "confidence": 0.5}]
    return [EpisodeAnswers(task, "", one, one) for task in tasks]


def test_label_scores_are_those_of_their_formulas():
    targets, answers = list("aabbcc"), list("aabcba")
    f1 = []
    for label in "abc":
        right = sum(t == a == label for t, a in zip(targets, answers, strict=True))
        f1.append(2 * right / (targets.count(label) + answers.count(label)))
    found = label_scores(targets, answers)
    assert found == pytest.approx({"accuracy": 0.5, "macro_f1": sum(f1) / 3, "relation_f1": 0.5})


def longest_common(first: list[str], second: list[str]) -> int:
    lengths = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, x in enumerate(first):
        for j, y in enumerate(second):
            lengths[i + 1, j + 1] = lengths[i, j] + 1 if x == y else max(lengths[i, j + 1], lengths[i + 1, j])
    return int(lengths[-1, -1])


def chrf(target: str, answer: str, order: int = 6, beta: int = 2) -> float:
    """chrF of one text by the formula of Popović (2015), over the orders that both texts are long enough for."""
    target, answer = target.replace(" ", ""), answer.replace(" ", "")
    found = []
    for n in range(1, order + 1):
        asked, said = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (target, answer))
        if not asked or not said:
            continue
        both = (asked & said).total()
        precision, recall = both / said.total(), both / asked.total()
        found.append((1 + beta**2) * precision * recall / (beta**2 * precision + recall) if both else 0.0)
    return sum(found) / len(found)


def test_text_scores_are_those_of_their_formulas():
    targets = ["the cat sat on the mat", "yes", "red wine from france"]
    answers = ["a cat sat on mat", "no", "red wine"]
    found = text_scores(targets, answers)
    # SQuAD leaves articles out: the first answer is the target's words.
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["token_f1"] == pytest.approx((1 + 0 + 2 * 1 * 0.5 / 1.5) / 3)
    f = []
    for target, answer in zip(targets, answers, strict=True):
        both = longest_common(target.split(), answer.split())
        precision, recall = both / len(answer.split()), both / len(target.split())
        f.append(2 * precision * recall / (precision + recall) if both else 0.0)
    assert found["rouge_l"] == pytest.approx(sum(f) / 3)
    perfect = text_scores(targets, targets)
    assert perfect.pop("rouge_2") == pytest.approx(2 / 3)  # "yes" has no two words
    assert perfect == pytest.approx(dict.fromkeys(perfect, 1.0))
    assert found["chrf"] == pytest.approx(sum(map(chrf, targets, answers)) / 3, abs=1e-3)


@pytest.mark.parametrize("kind", ["label", "pair", "relation"])
def test_tasks_of_labels_that_have_one_target_are_scored_as_text(kind):
    texts = [{"target": "yes", "answer": "yes", "answers": [], "input": "a"}]
    losses = [Curve("t", 0, False, [1.0, 0.5])]
    found = summarize_evaluation(Evaluation(losses, losses, [EpisodeAnswers("t", kind, texts, texts)]))
    assert found["tasks"]["t"]["answers"]["exact_match"]["after"]["mean"] == 1.0
    labelled, written = result("lora", 0, {"t1": [1.0]}), result("lora", 0, {"t2": [1.0]})
    for episode, queries in ((labelled["episodes"][0], None), (written["episodes"][0], texts)):
        episode |= {"kind": kind} | ({"queries": queries} if queries else {})
    labelled["episodes"] += written["episodes"]
    assert set(summarize([labelled])["kinds"]) == {kind, "text"}


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy():
    rng = np.random.default_rng(0)
    queries = [{"confidence": float(c), "answer": "a", "target": "ab"[int(rng.random() > c)]} for c in rng.random(300)]
    bins = [[q for q in queries if int(min(q["confidence"] * BINS, BINS - 1)) == b] for b in range(BINS)]
    gaps = [abs(sum(q["confidence"] - (q["answer"] == q["target"]) for q in group)) for group in bins]
    assert calibration_error(queries) == pytest.approx(sum(gaps) / 300, abs=1e-4)


def result(name, seed, scores, **more):
    """A result of given accuracies, `{task: [of each episode]}`, with four queries an episode."""
    episodes = []
    for task, values in scores.items():
        for index, value in enumerate(values):
            said = ["yes"] * round(4 * value) + ["no"] * (4 - round(4 * value))
            queries = [{"target": "yes", "answer": answer, "confidence": 0.5} for answer in said]
            episodes.append({"task": task, "index": index, "curve": [0.5, value], "seconds": 1.0, "queries": queries})
    costs = {"outer_steps": 5, "tokens": 100, "seconds": 1.0}
    setting = {"setting": {"factor": 1.0, "steps": 1}, "tried": [1], "labels": "words"}
    return {"method": name, "seed": seed, "episodes": episodes, **costs, **setting, **more}


def test_differences_are_paired_by_episode():
    base = {"t1": [0.0, 0.25, 0.75], "t2": [0.5, 0.0, 0.75]}
    better = {task: [value + 0.25 for value in values] for task, values in base.items()}
    moved = result("fomaml", 0, better)
    moved["episodes"] = moved["episodes"][::-1]  # as they come does not matter
    summary = summarize([result("multitask", 0, base), moved])
    rows = {row["method"]: row for row in summary["kinds"]["label"]["methods"]}
    assert rows["fomaml"]["over_baseline"] == {"mean": 0.25, "low": 0.25, "high": 0.25}
    assert rows["fomaml"]["main"]["high"] > rows["fomaml"]["main"]["low"]
    assert rows["fomaml"]["worst"] == {"task": "t1", "score": pytest.approx(7 / 12)}
    assert rows["multitask"]["over_baseline"] is None
    assert rows["fomaml"]["curve"] == pytest.approx([0.5, np.mean([*better["t1"], *better["t2"]])])
