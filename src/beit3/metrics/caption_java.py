"""METEOR and SPICE of captions by pycocoevalcap's Java programs, where Java and it are installed.

Nothing else in this package needs them. SPICE 1.0 needs Java 8 and downloads language models of its
own at the first use.
"""

import importlib
import shutil
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from beit3.metrics.caption import tokenize_captions

SCORERS = {
    "meteor": ("pycocoevalcap.meteor.meteor", "Meteor"),
    "spice": ("pycocoevalcap.spice.spice", "Spice"),
}
"""Metric to the module and class that compute it."""


def explain_missing_java() -> str:
    """Returns what METEOR and SPICE lack on this machine and the remedy, or "" if nothing."""
    if not shutil.which("java"):
        return (
            "METEOR and SPICE need Java: put a runtime's `java` on the PATH (SPICE needs version 8)"
        )
    if not find_spec("pycocoevalcap"):
        return "METEOR and SPICE need the package pycocoevalcap: pip install pycocoevalcap"
    return ""


def score_captions_with_java(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Returns `meteor` and `spice`, 0 to 1, of the same inputs as `score_captions`.

    The result is empty if `explain_missing_java` names something. A scorer that fails, as SPICE
    does under a recent Java, is left out with a warning. Raises ValueError as `score_captions`.
    """
    candidate_tokens, reference_tokens = tokenize_captions(candidates, references)
    if explain_missing_java():
        return {}
    candidate_texts = {key: [" ".join(tokens)] for key, tokens in candidate_tokens.items()}
    reference_texts = {
        key: [" ".join(tokens) for tokens in token_lists]
        for key, token_lists in reference_tokens.items()
    }
    scores = {}
    for name, (module, class_name) in SCORERS.items():
        try:
            scorer = getattr(importlib.import_module(module), class_name)()
            scores[name] = float(scorer.compute_score(reference_texts, candidate_texts)[0])
        except Exception as error:  # a foreign program may fail with anything
            warnings.warn(
                f"{name} left out: pycocoevalcap failed with {type(error).__name__}: {error}",
                stacklevel=2,
            )
    return scores
