"""METEOR and SPICE of captions through pycocoevalcap's Java programs, where Java and that package are at hand.

Nothing else needs them. SPICE 1.0 wants Java 8 and fetches language models of its own at the first use.
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


def java_missing() -> str:
    """What METEOR and SPICE lack here, and the remedy; "" where nothing is missing."""
    if not shutil.which("java"):
        return (
            "METEOR and SPICE need Java: put a runtime's `java` on the PATH (SPICE wants version 8)"
        )
    if not find_spec("pycocoevalcap"):
        return "METEOR and SPICE need the package pycocoevalcap: pip install pycocoevalcap"
    return ""


def java_scores(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """`meteor` and `spice`, 0 to 1, of the same input as `caption_scores`; {} where `java_missing` says why.

    One that fails, as SPICE does under a recent Java, is left out with a warning. ValueError as `caption_scores`.
    """
    texts, truths = tokenize_captions(candidates, references)
    if java_missing():
        return {}
    results = {key: [" ".join(tokens)] for key, tokens in texts.items()}
    truth = {key: [" ".join(tokens) for tokens in several] for key, several in truths.items()}
    scores = {}
    for name, (module, scorer) in SCORERS.items():
        try:
            scores[name] = float(
                getattr(importlib.import_module(module), scorer)().compute_score(truth, results)[0]
            )
        except Exception as fault:  # whatever a foreign program fails with
            warnings.warn(
                f"{name} left out: pycocoevalcap failed with {type(fault).__name__}: {fault}",
                stacklevel=2,
            )
    return scores
