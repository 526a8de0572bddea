"""Statistics of a prepared source: images and their uses, lengths of texts, vocabulary, labels.

`RecordStatistics` counts them while the records pass. Its `report` is the JSON that `prepare`
returns, and `describe` turns that into lines for people. Memory grows with the number of images
only.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beit3.data.stores.records import IMAGE_FIELDS

NUM_BINS = 10
BAR_WIDTH = 40
"""Characters of the longest bar of a histogram."""
MAX_LISTED_FAULTS = 20
"""Unusable records that people see by name; the report has them all."""
MAX_LISTED_LABELS = 5
"""With at most so many labels, each one's records are counted separately."""


@dataclass(frozen=True)
class TokenCounter:
    """How texts are measured: in tokens, as the task reads them.

    Attributes:
        encode: Returns a text's token ids without special tokens.
        limit: Number of tokens, special tokens included, at which the task cuts a text; 0 for none.
        unk: Id of the unknown token.
        num_pieces: Number of ids that `encode` can return besides `unk`.
        num_special_tokens: Number of special tokens that are added to each text.
    """

    encode: Callable[[str], list[int]]
    limit: int
    unk: int
    num_pieces: int
    num_special_tokens: int = 2


class RecordStatistics:
    """Counts over records that are added one by one.

    Args:
        lengths: How texts are measured; None counts words.
    """

    def __init__(self, lengths: TokenCounter | None) -> None:
        self.lengths = lengths
        self.uses: Counter[str] = Counter()
        """Image path -> number of records that use it."""
        self.sizes: Counter[int] = Counter()
        """Length of a text -> number of texts of that length."""
        self.labels: Counter[int] = Counter()
        """Label -> number of its records."""
        self.tokens = self.unknown = 0
        self.seen: set[int] = set()
        """Token ids that occur."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Counts one record."""
        # As a set: the two images of an NLVR1 record are one file.
        self.uses.update({record[key] for key in IMAGE_FIELDS if key in record})
        if "label" in record:
            self.labels[record["label"]] += 1
        texts = [record["text"]] if "text" in record else record.get("captions", ())
        for text in texts:
            self._count_text(text)

    def _count_text(self, text: str) -> None:
        if self.lengths is None:
            self.sizes[len(text.split())] += 1
            return
        token_ids = self.lengths.encode(text)
        self.sizes[len(token_ids) + self.lengths.num_special_tokens] += 1
        self.tokens += len(token_ids)
        self.unknown += token_ids.count(self.lengths.unk)
        self.seen.update(token_ids)

    def get_text_counts(self) -> dict[str, Any]:
        """Returns the counts of texts as JSON, for `add_counts` of statistics with the same
        `lengths`."""
        return {
            "sizes": [*self.sizes.items()],
            "tokens": self.tokens,
            "unknown": self.unknown,
            "seen": sorted(self.seen),
        }

    def add_counts(self, text_counts: Mapping[str, Any]) -> None:
        """Adds the counts of other texts, as `get_text_counts` returns them."""
        self.sizes.update(dict(map(tuple, text_counts["sizes"])))
        self.tokens += text_counts["tokens"]
        self.unknown += text_counts["unknown"]
        self.seen.update(text_counts["seen"])

    def report(self) -> dict[str, Any]:
        """Returns `images`, `labels` and `lengths`, each where there are some.

        Fractions are between 0 and 1.
        """
        report: dict[str, Any] = {}
        if self.uses:
            report["images"] = self._report_images()
        if self.labels:
            report["labels"] = self._report_labels()
        if self.sizes:
            report["lengths"] = {
                "unit": "tokens" if self.lengths else "words",
                "median": compute_quantile(self.sizes, 0.5),
                "percentile_95": compute_quantile(self.sizes, 0.95),
                "longest": max(self.sizes),
                **self._report_tokens(),
                "histogram": compute_histogram(self.sizes),
            }
        return report

    def _report_images(self) -> dict[str, int]:
        use_counts = Counter(self.uses.values())
        return {
            "distinct": len(self.uses),
            "median_uses": compute_quantile(use_counts, 0.5),
            "most_uses": max(use_counts),
        }

    def _report_labels(self) -> dict[str, Any]:
        report: dict[str, Any] = {
            "distinct": len(self.labels),
            "smallest": min(self.labels.values()),
            "largest": max(self.labels.values()),
        }
        if len(self.labels) <= MAX_LISTED_LABELS:
            report["counts"] = {str(label): self.labels[label] for label in sorted(self.labels)}
        return report

    def _report_tokens(self) -> dict[str, Any]:
        """Returns the fractions of texts that are cut, of unknown tokens, and of pieces that
        occur; {} without a tokenizer."""
        if self.lengths is None:
            return {}
        limit = self.lengths.limit
        num_cut = sum(count for size, count in self.sizes.items() if limit and size > limit)
        return {
            "limit": limit,
            "cut": num_cut / self.sizes.total(),
            "unknown": self.unknown / max(1, self.tokens),
            "pieces": self.lengths.num_pieces,
            "pieces_seen": len(self.seen - {self.lengths.unk}) / self.lengths.num_pieces,
        }


def compute_quantile(counts: Counter[int], fraction: float) -> int:
    """Returns the smallest value that at least this fraction of all values does not exceed."""
    num_values = 0
    for value in sorted(counts):
        num_values += counts[value]
        if num_values >= fraction * counts.total():
            return value
    raise AssertionError("no values")


def compute_histogram(sizes: Counter[int]) -> dict[str, int]:
    """Returns "first-last" -> count, in bins of one width up to the 99th percentile.

    The last bin also holds everything beyond.
    """
    low, high = min(sizes), compute_quantile(sizes, 0.99)
    width = max(1, math.ceil((high + 1 - low) / NUM_BINS))
    counts: Counter[int] = Counter()
    for size, count in sizes.items():
        counts[min(size - low, high - low) // width] += count
    histogram = {}
    last_bin = max(counts)
    for i in range(last_bin + 1):
        first = low + i * width
        last = max(sizes) if i == last_bin else first + width - 1
        histogram[f"{first}-{last}"] = counts[i]
    return histogram


# For people -----------------------------------------------------------------------------------


def describe(report: Mapping[str, Any]) -> str:
    """Returns a report as lines of text: a table, the unusable records, a histogram of lengths."""
    rows = [(split, f"{count:,}") for split, count in report.get("records", {}).items()]
    for name, value in report.items():
        if isinstance(value, int | float | str):
            rows.append((name.replace("_", " "), str(value)))
    if "images" in report:
        rows.append(("images", _describe_images(report["images"])))
    if "labels" in report:
        rows.append(("labels", _describe_labels(report["labels"])))
    if "lengths" in report:
        rows += _make_length_rows(report["lengths"])
    if "classes_without_images" in report:
        rows.append(("no images of", describe_names(report["classes_without_images"])))
    if "left_out" in report:
        rows.append(("left out", describe_left_out(report["left_out"])))
    faults = report.get("passed_over", [])
    rows.append(("passed over", f"{len(faults):,}"))
    lines = [f"{name:<12} {value}" for name, value in rows]
    lines += [f"  {fault}" for fault in faults[:MAX_LISTED_FAULTS]]
    if len(faults) > MAX_LISTED_FAULTS:
        lines.append("  ...")
    if "lengths" in report:
        lines += _draw_histogram(report["lengths"])
    return "\n".join(lines)


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Returns the numbers of files that were left out: "10 .heic, 3 .txt"."""
    return ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())


def describe_names(names: Sequence[str]) -> str:
    """Returns the first names of a list, and how many there are besides."""
    listed = ", ".join(names[:MAX_LISTED_FAULTS])
    num_others = len(names) - MAX_LISTED_FAULTS
    return f"{listed} and {num_others:,} others" if num_others > 0 else listed


def _describe_images(images: Mapping[str, int]) -> str:
    return (
        f"{images['distinct']:,} distinct; uses per image: median {images['median_uses']}, "
        f"most {images['most_uses']}"
    )


def _describe_labels(labels: Mapping[str, Any]) -> str:
    if "counts" in labels:
        counts = ", ".join(f"{count:,} of {label}" for label, count in labels["counts"].items())
        return f"{labels['distinct']:,} distinct; {counts}"
    return (
        f"{labels['distinct']:,} distinct; smallest of {labels['smallest']:,} records, "
        f"largest of {labels['largest']:,}"
    )


def _make_length_rows(lengths: Mapping[str, Any]) -> list[tuple[str, str]]:
    unit = lengths["unit"]
    summary = (
        f"median {lengths['median']} {unit}, 95 % up to {lengths['percentile_95']}, "
        f"longest {lengths['longest']:,}"
    )
    rows = [("texts", summary)]
    if "hint" in lengths:
        rows.append(("", lengths["hint"]))
    if "limit" not in lengths:
        return rows
    if lengths["limit"]:
        cut = f"{lengths['cut']:.1%} are longer than {lengths['limit']} {unit} and will be cut"
        rows.append(("", cut))
    vocabulary = (
        f"{lengths['pieces_seen']:.1%} of {lengths['pieces']:,} pieces occur, "
        f"{lengths['unknown']:.2%} unknown"
    )
    return [*rows, ("vocabulary", vocabulary)]


def _draw_histogram(lengths: Mapping[str, Any]) -> list[str]:
    """Draws one bar per bin; the longest is `BAR_WIDTH` wide, and only an empty bin has none."""
    bins = lengths["histogram"]
    largest = max(bins.values())
    name_width = max(map(len, bins))
    lines = ["", f"texts by length in {lengths['unit']}"]
    for name, count in bins.items():
        bar = "#" * math.ceil(BAR_WIDTH * count / largest)
        lines.append(f"{name:>{name_width}} {bar:<{BAR_WIDTH}} {count:,}")
    return lines
