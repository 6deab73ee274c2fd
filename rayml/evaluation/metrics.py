"""Scores of answers, by torchmetrics and sacrebleu, from 0 to 1; higher is better but for the calibration error."""

from collections.abc import Sequence
from typing import Any

import torch
from sacrebleu.metrics import CHRF
from torchmetrics.functional.classification import binary_calibration_error, multiclass_f1_score
from torchmetrics.functional.text import rouge_score, squad

LABELS = "accuracy", "macro_f1"
TEXT = "exact_match", "token_f1", "rouge_l", "chrf"
BINS = 15


def scores(queries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the scores of one episode's answers: those in `LABELS`, or, for free text, in `TEXT`."""
    if "confidence" in queries[0]:
        return label_scores([q["target"] for q in queries], [q["answer"] for q in queries])
    return text_scores([q["target"] for q in queries], [q["answer"] for q in queries])


def label_scores(targets: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return accuracy, and the mean of the classes' F1."""
    places = {label: place for place, label in enumerate(dict.fromkeys([*targets, *answers]))}
    right, chosen = (torch.tensor([places[label] for label in labels]) for labels in (targets, answers))
    f1 = multiclass_f1_score(chosen, right, num_classes=max(2, len(places)), average="macro")
    return {"accuracy": float((right == chosen).float().mean()), "macro_f1": float(f1)}


def text_scores(targets: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return exact match and token F1 as SQuAD has them (Rajpurkar et al. 2016), ROUGE-L (Lin 2004) and chrF (Popović
    2015), each the mean over the answers."""
    asked: list[Any] = [
        {"answers": {"answer_start": [0], "text": [text]}, "id": str(n)} for n, text in enumerate(targets)
    ]
    said: list[Any] = [{"prediction_text": text, "id": str(n)} for n, text in enumerate(answers)]
    by_squad = squad(said, asked)
    # torchmetrics' own chrF counts orders that a short text does not have: two equal words of three letters score 0.5.
    chrf = [CHRF().sentence_score(answer, [target]).score for answer, target in zip(answers, targets, strict=True)]
    return {
        "exact_match": float(by_squad["exact_match"]) / 100,
        "token_f1": float(by_squad["f1"]) / 100,
        "rouge_l": float(rouge_score(list(answers), list(targets), rouge_keys="rougeL")["rougeL_fmeasure"]),
        "chrf": sum(chrf) / len(chrf) / 100,
    }


def calibration_error(queries: Sequence[dict[str, Any]]) -> float:
    """Return the expected calibration error of label answers (Naeini et al. 2015), over bins of equal width."""
    confidence = torch.tensor([query["confidence"] for query in queries], dtype=torch.float32)
    right = torch.tensor([int(query["answer"] == query["target"]) for query in queries])
    return float(binary_calibration_error(confidence, right, n_bins=BINS))
