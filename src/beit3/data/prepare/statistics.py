"""What a prepared source holds, counted while its records pass: images and their uses, texts,
vocabulary, labels.

`Survey.report` is the JSON that `prepare` returns, `describe` the same for people. Memory grows
with the images only.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from beit3.data.stores.records import IMAGE_FIELDS

BINS = 10
BAR = 40
NAMED = 20
"""Unusable records that people see by name; the report has them all."""
FEW_LABELS = 5
"""Labels that are counted one by one."""


@dataclass(frozen=True)
class Lengths:
    """How texts are measured: in tokens, as the task reads them.

    pieces: a text's ids without begin and end mark; marks: how many marks are added. limit: tokens
    at which the task cuts
    a text, marks included; 0 = it does not. unk: the id of an unknown character. num_pieces: ids
    that `pieces` can give
    beside `unk`.
    """

    pieces: Callable[[str], list[int]]
    limit: int
    unk: int
    num_pieces: int
    marks: int = 2


class Survey:
    """Takes the records one by one. Without `lengths` texts are measured in words."""

    def __init__(self, lengths: Lengths | None) -> None:
        self.lengths = lengths
        self.uses: Counter[str] = Counter()
        self.sizes: Counter[int] = Counter()
        self.labels: Counter[int] = Counter()
        self.tokens = self.unknown = 0
        self.seen: set[int] = set()

    def add(self, record: Mapping[str, Any]) -> None:
        self.uses.update(
            {record[key] for key in IMAGE_FIELDS if key in record}
        )  # NLVR1's two are one file
        if "label" in record:
            self.labels[record["label"]] += 1
        for text in [record["text"]] if "text" in record else record.get("captions", ()):
            self._measure(text)

    def _measure(self, text: str) -> None:
        if self.lengths is None:
            self.sizes[len(text.split())] += 1
            return
        pieces = self.lengths.pieces(text)
        self.sizes[len(pieces) + self.lengths.marks] += 1
        self.tokens += len(pieces)
        self.unknown += pieces.count(self.lengths.unk)
        self.seen.update(pieces)

    def texts(self) -> dict[str, Any]:
        """What was counted of texts, as JSON, for `take` of another survey with the same
        `lengths`."""
        return {
            "sizes": [*self.sizes.items()],
            "tokens": self.tokens,
            "unknown": self.unknown,
            "seen": sorted(self.seen),
        }

    def take(self, texts: Mapping[str, Any]) -> None:
        """Add what another survey counted of other texts."""
        self.sizes.update(dict(map(tuple, texts["sizes"])))
        self.tokens += texts["tokens"]
        self.unknown += texts["unknown"]
        self.seen.update(texts["seen"])

    def report(self) -> dict[str, Any]:
        """`images`, `labels` and `lengths`, each where there are some; shares are between 0 and
        1."""
        report: dict[str, Any] = {}
        if self.uses:
            uses = Counter(self.uses.values())
            report["images"] = {
                "distinct": len(self.uses),
                "median_uses": quantile(uses, 0.5),
                "most_uses": max(uses),
            }
        if self.labels:
            counts = self.labels
            report["labels"] = {
                "distinct": len(counts),
                "smallest": min(counts.values()),
                "largest": max(counts.values()),
            }
            if len(counts) <= FEW_LABELS:
                report["labels"]["counts"] = {str(label): counts[label] for label in sorted(counts)}
        if self.sizes:
            report["lengths"] = {
                "unit": "tokens" if self.lengths else "words",
                "median": quantile(self.sizes, 0.5),
                "percentile_95": quantile(self.sizes, 0.95),
                "longest": max(self.sizes),
                **self._tokens(),
                "histogram": histogram(self.sizes),
            }
        return report

    def _tokens(self) -> dict[str, Any]:
        """What only a tokenizer tells: the share of texts that are cut, of unknown tokens, and of
        pieces that occur."""
        if self.lengths is None:
            return {}
        limit = self.lengths.limit
        cut = sum(count for size, count in self.sizes.items() if limit and size > limit)
        return {
            "limit": limit,
            "cut": cut / self.sizes.total(),
            "unknown": self.unknown / max(1, self.tokens),
            "pieces": self.lengths.num_pieces,
            "pieces_seen": len(self.seen - {self.lengths.unk}) / self.lengths.num_pieces,
        }


def quantile(counts: Counter[int], share: float) -> int:
    """The smallest value that at least this share of all values do not exceed."""
    below = 0
    for value in sorted(counts):
        below += counts[value]
        if below >= share * counts.total():
            return value
    raise AssertionError("no values")


def histogram(sizes: Counter[int]) -> dict[str, int]:
    """ "first-last" -> count in bins of one width up to the 99th percentile; the last bin takes all
    that is longer."""
    low, high = min(sizes), quantile(sizes, 0.99)
    width = max(1, -(-(high + 1 - low) // BINS))
    counts: Counter[int] = Counter()
    for size, count in sizes.items():
        counts[min(size - low, high - low) // width] += count
    last = max(counts)
    return {
        f"{low + i * width}-{max(sizes) if i == last else low + (i + 1) * width - 1}": counts[i]
        for i in range(last + 1)
    }


def describe(report: Mapping[str, Any]) -> str:
    """A report as lines for people: a table of what is there, a picture of the lengths, and what
    was passed over."""
    rows = [(split, f"{count:,}") for split, count in report.get("records", {}).items()]
    rows += [
        (name.replace("_", " "), str(value))
        for name, value in report.items()
        if isinstance(value, int | float | str)
    ]
    if "images" in report:
        images = report["images"]
        rows.append(
            (
                "images",
                f"{images['distinct']:,} distinct; uses of one: median {images['median_uses']}, "
                f"most {images['most_uses']}",
            )
        )
    if "labels" in report:
        labels = report["labels"]
        each = ", ".join(
            f"{count:,} of {label}" for label, count in labels.get("counts", {}).items()
        )
        few = f"smallest of {labels['smallest']:,} records, largest of {labels['largest']:,}"
        rows.append(("labels", f"{labels['distinct']:,} distinct; {each or few}"))
    rows += _length_rows(report["lengths"]) if "lengths" in report else []
    passed = report.get("passed_over", [])
    rows.append(("passed over", f"{len(passed):,}"))
    lines = [f"{name:<12} {value}" for name, value in rows]
    lines += [f"  {line}" for line in passed[:NAMED]] + (["  ..."] if len(passed) > NAMED else [])
    return "\n".join(lines + (_picture(report["lengths"]) if "lengths" in report else []))


def _length_rows(lengths: Mapping[str, Any]) -> list[tuple[str, str]]:
    unit = lengths["unit"]
    text = (
        f"median {lengths['median']} {unit}, 95 % up to {lengths['percentile_95']}, longest "
        f"{lengths['longest']:,}"
    )
    rows = [("texts", text)]
    if "hint" in lengths:
        rows.append(("", lengths["hint"]))
    if "limit" in lengths:
        if lengths["limit"]:
            rows.append(
                (
                    "",
                    f"{lengths['cut']:.1%} are longer than {lengths['limit']} {unit} and will be "
                    "cut",
                )
            )
        rows.append(
            (
                "vocabulary",
                f"{lengths['pieces_seen']:.1%} of {lengths['pieces']:,} pieces occur, "
                f"{lengths['unknown']:.2%} unknown",
            )
        )
    return rows


def _picture(lengths: Mapping[str, Any]) -> list[str]:
    """One bar a bin; the longest is BAR wide, and nothing that is there is drawn as nothing."""
    bins = lengths["histogram"]
    most, wide = max(bins.values()), max(map(len, bins))
    bars = [
        f"{name:>{wide}} {'#' * -(-BAR * count // most):<{BAR}} {count:,}"
        for name, count in bins.items()
    ]
    return ["", f"texts by length in {lengths['unit']}", *bars]
