"""Scores of answers by torchmetrics, sacrebleu and seqeval, from 0 to 1; higher is better, except calibration error.

A word is a run of letters and digits of any script; in scripts without spaces (Han, Kana, Thai), a character.

torchmetrics and scikit-learn (for seqeval) take seconds to import, and every worker would wait for them. So each
function imports what it uses.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import regex
import torch
from sacrebleu.metrics import BLEU, CHRF

from rayml.tasks.kinds import KINDS, LABELS, NO_RELATION, parse_labels, parse_spans

BINS = 15
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]"
WORD = regex.compile(rf"{UNSPACED}|(?:(?!{UNSPACED})[\p{{L}}\p{{M}}\p{{N}}])+")
TOKEN = regex.compile(rf"{UNSPACED}|(?:(?!{UNSPACED})\S)+")
Queries = Sequence[dict[str, Any]]
"""Answered queries: `target`, `answer`, for labels `confidence`, for texts `input` and other correct `answers`."""


def metrics_of(kind: str, is_label: bool) -> tuple[str, ...]:
    """Return the names of a task's metrics, the main metric first."""
    if is_label:
        return KINDS[kind].metrics if kind in ("pair", "relation") else LABELS
    return KINDS[text_kind(kind)].metrics


def text_kind(kind: str) -> str:
    """Return the kind that free text is scored by: "text" for a kind of labels, as of pairs with one target for all."""
    return kind if kind in KINDS and KINDS[kind].metrics[0] != LABELS[0] else "text"


def scores(kind: str, queries: Queries) -> dict[str, float]:
    """Return the scores of one episode's answers, by the names in `metrics_of`."""
    is_label = "confidence" in queries[0]
    targets, answers = [q["target"] for q in queries], [q["answer"] for q in queries]
    if is_label:
        values = label_scores(targets, answers)
    elif kind == "multilabel":
        values = multilabel_scores(targets, answers)
    elif kind == "ner":
        values = span_scores(queries)
    else:
        values = text_scores(targets, answers, [q.get("answers", []) for q in queries])
    return {name: values[name] for name in metrics_of(kind, is_label)}


def label_scores(targets: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return accuracy, macro F1, and the micro F1 of relations, which does not count "no relation"."""
    from torchmetrics.functional.classification import multiclass_f1_score

    indices = {label: index for index, label in enumerate(dict.fromkeys([*targets, *answers]))}
    target_ids, answer_ids = (torch.tensor([indices[label] for label in labels]) for labels in (targets, answers))
    f1 = multiclass_f1_score(answer_ids, target_ids, num_classes=max(2, len(indices)), average="macro")
    relations = [(relation_set(target), relation_set(answer)) for target, answer in zip(targets, answers, strict=True)]
    return {
        "accuracy": float((target_ids == answer_ids).float().mean()),
        "macro_f1": float(f1),
        "relation_f1": multilabel_f1(relations, "micro"),
    }


def relation_set(relation: str) -> set[str]:
    return set() if relation.lower().replace(" ", "_") in NO_RELATION else {relation}


def multilabel_scores(targets: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return micro F1, macro F1, and the share of answers with exactly the target's labels."""
    pairs = [
        (set(parse_labels(target)), set(parse_labels(answer))) for target, answer in zip(targets, answers, strict=True)
    ]
    return {
        "micro_f1": multilabel_f1(pairs, "micro"),
        "macro_f1": multilabel_f1(pairs, "macro"),
        "exact_match": sum(target == answer for target, answer in pairs) / len(pairs),
    }


def multilabel_f1(pairs: Sequence[tuple[set[str], set[str]]], average: Literal["micro", "macro"]) -> float:
    """Return the F1 of (target, answer) label sets; 1 if all are empty."""
    right, said = Counter[str](), Counter[str]()
    for target, answer in pairs:
        right.update(target & answer)
        said.update([*target, *answer])
    if not said:
        return 1.0
    if average == "micro":
        return 2 * right.total() / said.total()
    return sum(2 * right[label] / count for label, count in said.items()) / len(said)


def span_scores(queries: Queries) -> dict[str, float]:
    """Return precision, recall and F1 of whole spans with their types, as in CoNLL."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    targets, answers = bio_tags(queries)
    if not any((*targets, *answers)):
        return dict.fromkeys(("span_f1", "span_precision", "span_recall"), 1.0)
    return {
        "span_f1": float(f1_score(targets, answers, zero_division=0)),
        "span_precision": float(precision_score(targets, answers, zero_division=0)),
        "span_recall": float(recall_score(targets, answers, zero_division=0)),
    }


def span_report(queries: Queries) -> str:
    """Return seqeval's report: precision, recall, F1 and number of spans, by type."""
    from seqeval.metrics import classification_report

    targets, answers = bio_tags(queries)
    if not any((*targets, *answers)):
        return "no spans, neither in targets nor in answers"
    return str(classification_report(targets, answers, zero_division=0))


def bio_tags(queries: Queries) -> tuple[list[list[str]], list[list[str]]]:
    """Return the tags of every query's spans, for the targets and for the answers.

    Each span has one tag, at the same place in both if its type and its words are the same. A place is "O" where only
    the other side has the span, or has it more often. Neither the order of spans counts, nor where a text holds them.
    """
    targets: list[list[str]] = []
    answers: list[list[str]] = []
    for query in queries:
        target, answer = (Counter(map(typed_words, parse_spans(query[key]))) for key in ("target", "answer"))
        places = [(span, number) for span, count in (target | answer).items() for number in range(count)]
        for tags, found in ((targets, target), (answers, answer)):
            tags.append([f"B-{span[0]}" if number < found[span] else "O" for span, number in places])
    return targets, answers


def typed_words(typed_span: tuple[str, str]) -> tuple[str, tuple[str, ...]]:
    """Return a span's type and its words, without punctuation that is attached to them."""
    kind, text = typed_span
    return kind, tuple(" ".join(WORD.findall(token)) or token for token in TOKEN.findall(text))


def text_scores(
    targets: Sequence[str], answers: Sequence[str], others: Sequence[Sequence[str]] = ()
) -> dict[str, float]:
    """Return SQuAD's exact match and token F1 (Rajpurkar et al. 2016), ROUGE (Lin 2004), chrF (Popović 2015) and
    sentence BLEU (Papineni et al. 2002), each averaged over the answers.

    Args:
        others: other correct answers for each target; the best match counts.
    """
    from torchmetrics.functional.text import rouge_score, squad

    references = [[target, *more] for target, more in zip(targets, others or [()] * len(targets), strict=True)]
    squad_targets: list[Any] = [
        {"answers": {"answer_start": [0] * len(texts), "text": [split_words(text) for text in texts]}, "id": str(index)}
        for index, texts in enumerate(references)
    ]
    squad_answers: list[Any] = [
        {"prediction_text": split_words(text), "id": str(index)} for index, text in enumerate(answers)
    ]
    squad_scores = squad(squad_answers, squad_targets)
    rouge = rouge_score(
        list(answers),
        references,
        rouge_keys=("rouge1", "rouge2", "rougeL"),
        normalizer=str.lower,
        tokenizer=WORD.findall,
    )
    # Not torchmetrics' chrF: it counts n-grams longer than the text, so that two equal three-letter words score 0.5.
    chrf = [CHRF().sentence_score(answer, texts).score for answer, texts in zip(answers, references, strict=True)]
    bleu = [
        BLEU(effective_order=True, tokenize=bleu_tokens(texts[0])).sentence_score(answer, texts).score
        for answer, texts in zip(answers, references, strict=True)
    ]
    return {
        "exact_match": float(squad_scores["exact_match"]) / 100,
        "token_f1": float(squad_scores["f1"]) / 100,
        "rouge_1": float(rouge["rouge1_fmeasure"]),
        "rouge_2": float(rouge["rouge2_fmeasure"]),
        "rouge_l": float(rouge["rougeL_fmeasure"]),
        "chrf": sum(chrf) / len(chrf) / 100,
        "bleu": sum(bleu) / len(bleu) / 100,
    }


def split_words(text: str) -> str:
    """Return a text with spaces between the characters of scripts without spaces."""
    return regex.sub(rf"({UNSPACED})", r" \1 ", text)


def bleu_tokens(text: str) -> str:
    """Return the name of sacrebleu's tokenizer for a text's script."""
    if regex.search(r"[\p{Hiragana}\p{Katakana}\p{Thai}]", text):
        return "char"
    return "zh" if regex.search(r"\p{Han}", text) else "13a"


def calibration_error(queries: Queries) -> float:
    """Return the expected calibration error of label answers (Naeini et al. 2015), over bins of equal width."""
    from torchmetrics.functional.classification import binary_calibration_error

    confidence = torch.tensor([query["confidence"] for query in queries], dtype=torch.float32)
    correct = torch.tensor([int(query["answer"] == query["target"]) for query in queries])
    return float(binary_calibration_error(confidence, correct, n_bins=BINS))
