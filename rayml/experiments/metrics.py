"""Scores of answers, by torchmetrics, sacrebleu and seqeval, from 0 to 1; of the calibration error less is better.

Words are runs of letters and digits of any script; where a script sets no spaces (Han, Kana, Thai), characters.

torchmetrics and scikit-learn (seqeval's) take seconds to import, for which every worker would wait: so each function
imports what it uses.
"""

from collections.abc import Sequence
from typing import Any

import regex
import torch
from sacrebleu.metrics import BLEU, CHRF

from rayml.tasks.kinds import KINDS, LABELS, NO_RELATION, listed, spans

BINS = 15
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]"
WORD = regex.compile(rf"{UNSPACED}|(?:(?!{UNSPACED})[\p{{L}}\p{{M}}\p{{N}}])+")
TOKEN = regex.compile(rf"{UNSPACED}|(?:(?!{UNSPACED})\S)+")
Queries = Sequence[dict[str, Any]]
"""What was answered: `target`, `answer`, for labels `confidence`, for texts `input` and other right `answers`."""


def metrics_of(kind: str, is_label: bool) -> tuple[str, ...]:
    """Return the names of a task's metrics; the first decides."""
    if is_label:
        return KINDS[kind].metrics if kind in ("pair", "relation") else LABELS
    return KINDS[kind if kind in KINDS else "text"].metrics


def scores(kind: str, queries: Queries) -> dict[str, float]:
    """Return the scores of one episode's answers, by the names in `metrics_of`."""
    is_label = "confidence" in queries[0]
    targets, answers = [q["target"] for q in queries], [q["answer"] for q in queries]
    if is_label:
        found = label_scores(targets, answers)
    elif kind == "multilabel":
        found = multilabel_scores(targets, answers)
    elif kind == "ner":
        found = span_scores(queries)
    else:
        found = text_scores(targets, answers, [q.get("answers", []) for q in queries])
    return {name: found[name] for name in metrics_of(kind, is_label)}


def label_scores(targets: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return accuracy, the mean of the classes' F1, and the F1 over all relations that are one."""
    from torchmetrics.functional.classification import multiclass_f1_score

    indices = {label: start for start, label in enumerate(dict.fromkeys([*targets, *answers]))}
    right, chosen = (torch.tensor([indices[label] for label in labels]) for labels in (targets, answers))
    f1 = multiclass_f1_score(chosen, right, num_classes=max(2, len(indices)), average="macro")
    related = [({t} - none(t), {a} - none(a)) for t, a in zip(targets, answers, strict=True)]
    return {
        "accuracy": float((right == chosen).float().mean()),
        "macro_f1": float(f1),
        "relation_f1": multilabel_f1(related, "micro"),
    }


def none(relation: str) -> set[str]:
    return {relation} if relation.lower().replace(" ", "_") in NO_RELATION else set()


def multilabel_scores(targets: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return the F1 over all labels, the mean of the labels' F1, and how many answers have all labels and no other."""
    pairs = [(set(listed(target)), set(listed(answer))) for target, answer in zip(targets, answers, strict=True)]
    return {
        "micro_f1": multilabel_f1(pairs, "micro"),
        "macro_f1": multilabel_f1(pairs, "macro"),
        "exact_match": sum(right == said for right, said in pairs) / len(pairs),
    }


def multilabel_f1(pairs: Sequence[tuple[set[str], set[str]]], average: Any) -> float:
    """Return the F1 of (right, said) labels; 1 where there is none in either."""
    from torchmetrics.functional.classification import multilabel_f1_score

    labels = sorted(set().union(*(right | said for right, said in pairs)))
    if not labels:
        return 1.0
    columns = [*labels, *[""] * (2 - len(labels))]  # torchmetrics wants two
    right, said = (torch.tensor([[label in pair[k] for label in columns] for pair in pairs]).int() for k in (0, 1))
    return float(multilabel_f1_score(said, right, num_labels=len(columns), average=average))


def span_scores(queries: Queries) -> dict[str, float]:
    """Return precision, recall and F1 of whole spans with their types, as CoNLL counts them."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    right, said = tagged(queries)
    if not any(tag != "O" for tags in (*right, *said) for tag in tags):
        return dict.fromkeys(("span_f1", "span_precision", "span_recall"), 1.0)
    return {
        "span_f1": float(f1_score(right, said, zero_division=0)),
        "span_precision": float(precision_score(right, said, zero_division=0)),
        "span_recall": float(recall_score(right, said, zero_division=0)),
    }


def span_report(queries: Queries) -> str:
    """Return seqeval's report: precision, recall, F1 and number of spans, by type."""
    from seqeval.metrics import classification_report

    return str(classification_report(*tagged(queries), zero_division=0))


def tagged(queries: Queries) -> tuple[list[list[str]], list[list[str]]]:
    """Return the BIO tags of every input's tokens, as they are and as they were answered.

    A span that the input does not hold gets tokens of its own behind it: it is wrong, and counts as said.
    """
    rights, saids = [], []
    for query in queries:
        tokens = TOKEN.findall(query["input"])
        right, said = (tags(tokens, spans(query[key])) for key in ("target", "answer"))
        longest = max(len(right[1]), len(said[1]))
        right_more, said_more = (more + ["O"] * (longest - len(more)) for _, more in (right, said))
        rights.append(right[0] + right_more)
        saids.append(said[0] + said_more)
    return rights, saids


def tags(tokens: Sequence[str], found: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Return the tags of the tokens, and those of spans that are not among them."""
    within, beyond = ["O"] * len(tokens), []
    for kind, text in found:
        span = TOKEN.findall(text)
        marks = [f"B-{kind}", *[f"I-{kind}"] * (len(span) - 1)]
        for start in range(len(tokens) - len(span) + 1):
            end = start + len(span)
            if matches(tokens[start:end], span) and set(within[start:end]) == {"O"}:
                within[start:end] = marks
                break
        else:
            beyond += marks
    return within, beyond


def matches(tokens: Sequence[str], span: Sequence[str]) -> bool:
    """Return whether tokens are a span's, but for punctuation that is written on to them."""
    return all(a == b or WORD.findall(a) == WORD.findall(b) != [] for a, b in zip(tokens, span, strict=True))


def text_scores(
    targets: Sequence[str], answers: Sequence[str], others: Sequence[Sequence[str]] = ()
) -> dict[str, float]:
    """Return exact match and token F1 as SQuAD has them (Rajpurkar et al. 2016), ROUGE (Lin 2004), chrF (Popović 2015)
    and BLEU (Papineni et al. 2002) of single sentences, each the mean over the answers.

    Args:
        others: right answers beside each target; the best counts.
    """
    from torchmetrics.functional.text import rouge_score, squad

    right = [[target, *more] for target, more in zip(targets, others or [()] * len(targets), strict=True)]
    asked: list[Any] = [
        {"answers": {"answer_start": [0] * len(texts), "text": [spaced(text) for text in texts]}, "id": str(n)}
        for n, texts in enumerate(right)
    ]
    said: list[Any] = [{"prediction_text": spaced(text), "id": str(n)} for n, text in enumerate(answers)]
    by_squad = squad(said, asked)
    rouge = rouge_score(
        list(answers),
        right,
        rouge_keys=("rouge1", "rouge2", "rougeL"),
        normalizer=str.lower,
        tokenizer=WORD.findall,
    )
    # torchmetrics' own chrF counts orders that a short text does not have: two equal words of three letters score 0.5.
    chrf = [CHRF().sentence_score(answer, texts).score for answer, texts in zip(answers, right, strict=True)]
    bleu = [
        BLEU(effective_order=True, tokenize=bleu_tokens(texts[0])).sentence_score(answer, texts).score
        for answer, texts in zip(answers, right, strict=True)
    ]
    return {
        "exact_match": float(by_squad["exact_match"]) / 100,
        "token_f1": float(by_squad["f1"]) / 100,
        "rouge_1": float(rouge["rouge1_fmeasure"]),
        "rouge_2": float(rouge["rouge2_fmeasure"]),
        "rouge_l": float(rouge["rougeL_fmeasure"]),
        "chrf": sum(chrf) / len(chrf) / 100,
        "bleu": sum(bleu) / len(bleu) / 100,
    }


def spaced(text: str) -> str:
    """Return a text with its words apart, for what splits at spaces."""
    return regex.sub(rf"({UNSPACED})", r" \1 ", text)


def bleu_tokens(text: str) -> str:
    """Return sacrebleu's tokenizer for a text's script."""
    if regex.search(r"[\p{Hiragana}\p{Katakana}\p{Thai}]", text):
        return "char"
    return "zh" if regex.search(r"\p{Han}", text) else "13a"


def calibration_error(queries: Queries) -> float:
    """Return the expected calibration error of label answers (Naeini et al. 2015), over bins of equal width."""
    from torchmetrics.functional.classification import binary_calibration_error

    confidence = torch.tensor([query["confidence"] for query in queries], dtype=torch.float32)
    right = torch.tensor([int(query["answer"] == query["target"]) for query in queries])
    return float(binary_calibration_error(confidence, right, n_bins=BINS))
