"""Finds videos in which several things happen one after the other.

Rows are frames; two columns say of which video and at what time. The answer of a video is one frame
for each step, in the order of time and within a window, with the largest sum of scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from beit3.search.filters import parse_filter
from beit3.search.query import Query, Result, Searcher, check_column

FIRST_CANDIDATES = 1000
"""Best frames of each step that are looked at first."""

GROWTH = 4

MAX_CANDIDATES = 1_000_000
"""Frames of each step that are looked at in the end, where fewer do not settle the answer."""


@dataclass(frozen=True)
class SequenceResult:
    """A video in which the steps occur in order."""

    rank: int
    """1 for the best."""
    video: str
    score: float
    """Sum of the scores of its frames."""
    frames: list[Result]
    """The frame of each step; their ranks are the numbers of the steps."""

    def to_row(self) -> dict[str, Any]:
        """Returns rank, video, score and the flat row of every frame."""
        frames = [{"step": frame.rank} | frame.to_row() for frame in self.frames]
        for frame in frames:
            frame.pop("rank")
        return {"rank": self.rank, "video": self.video, "score": self.score, "frames": frames}


@dataclass
class Frames:
    """The candidates of one video, in the order of time."""

    ids: list[str]
    times: np.ndarray
    """[F]"""
    scores: np.ndarray
    """[steps, F]; -inf where a frame is no candidate of a step."""

    @property
    def bound(self) -> float:
        """What no sequence of this video can exceed."""
        return float(self.scores.max(axis=1).sum())


def search_sequence(
    searcher: Searcher,
    steps: Sequence[Query | str],
    *,
    within: float,
    k: int = 10,
    offset: int = 0,
    where: str = "",
    video_column: str = "video",
    time_column: str = "time",
    max_candidates: int = MAX_CANDIDATES,
) -> tuple[list[SequenceResult], bool]:
    """Returns the videos in which the steps occur in order, the best first.

    The frames of consecutive steps have increasing times, and the last is at most `within` after
    the first. Candidates are added until no other frame could change the answer.

    Args:
        searcher: The index.
        steps: What happens, in order.
        within: Longest time from the first to the last step, in the unit of the time column.
        k: How many videos.
        offset: How many of the best to pass over.
        where: Condition on the frames' metadata.
        video_column: Column that names the video.
        time_column: Column of the frame's time, a number.
        max_candidates: Frames of each step that are looked at in the end.

    Returns:
        The videos, and whether the answer is exact: False where `max_candidates` or an approximate
        index ended the search before that was certain.

    Raises:
        ValueError: There are fewer than two steps, the window is not positive, a column is not
            there, or a time is no number.
    """
    if len(steps) < 2:
        raise ValueError(f"{len(steps)} step: a sequence needs at least two (--then)")
    if not within > 0:
        raise ValueError(f"within is {within}: give the longest time between first and last step")
    searcher.check_request(k, offset, "", "image")
    check_column(searcher.store, video_column)
    check_column(searcher.store, time_column)
    queries = [Query(step) if isinstance(step, str) else step for step in steps]
    vectors = searcher.make_vectors(queries)
    condition = parse_filter(where) if where else None
    store = searcher.store
    limit = max(1, min(max_candidates, store.num_rows, store.max_hits))
    num_candidates = min(FIRST_CANDIDATES, limit)
    while True:
        hits = searcher.store.search(vectors, num_candidates, where=condition)
        videos = _group_frames(searcher, hits.ids, hits.scores, video_column, time_column)
        best = _rank_videos(videos, k + offset, within)
        is_exact = _is_settled(
            hits.scores, num_candidates, searcher.store.num_rows, best, k + offset
        )
        if is_exact or num_candidates >= limit:
            break
        num_candidates = min(limit, GROWTH * num_candidates)
    results = [
        _make_result(searcher, rank, video, videos[video], chosen, score)
        for rank, (score, video, chosen) in enumerate(best, 1)
    ]
    return results[offset:], is_exact


def _group_frames(
    searcher: Searcher,
    all_ids: Sequence[Sequence[str]],
    all_scores: Sequence[np.ndarray],
    video_column: str,
    time_column: str,
) -> dict[str, Frames]:
    """Returns the candidates of all steps by video; frames without video or time are left out."""
    scores_by_id: dict[str, np.ndarray] = {}
    for step, (ids, scores) in enumerate(zip(all_ids, all_scores, strict=True)):
        for id, score in zip(ids, scores.tolist(), strict=True):
            if id not in scores_by_id:
                scores_by_id[id] = np.full(len(all_ids), -np.inf)
            scores_by_id[id][step] = score
    ids = list(scores_by_id)
    rows = searcher.store.fetch(ids, [video_column, time_column]) if ids else []
    frames_by_video: dict[str, list[tuple[float, str]]] = {}
    for id, row in zip(ids, rows, strict=True):
        video, time = row[video_column], row[time_column]
        if video is None or time is None:
            continue
        try:
            seconds = float(time)
        except (TypeError, ValueError):
            raise ValueError(
                f"{searcher.store.uri}: {time_column} of row {id} is {time!r}, no number: name the "
                "column of times (--time-column)"
            ) from None
        frames_by_video.setdefault(str(video), []).append((seconds, id))
    videos = {}
    for video, frames in frames_by_video.items():
        frames.sort()
        videos[video] = Frames(
            [id for _, id in frames],
            np.array([time for time, _ in frames]),
            np.stack([scores_by_id[id] for _, id in frames], axis=1),
        )
    return videos


def _rank_videos(
    videos: dict[str, Frames], wanted: int, within: float
) -> list[tuple[float, str, list[int]]]:
    """Returns (score, video, frame of each step) of the `wanted` best videos, the best first.

    Videos of equal score are in the order of their names.
    """
    best: list[tuple[float, str, list[int]]] = []
    for bound, video in sorted((-frames.bound, video) for video, frames in videos.items()):
        least = best[wanted - 1][0] if len(best) >= wanted else -np.inf
        if -bound < least or bound == np.inf:
            break
        score, chosen = find_best_sequence(videos[video].times, videos[video].scores, within)
        if chosen:
            best.append((score, video, chosen))
            best.sort(key=_sort_key)
            del best[wanted:]
    return best


def _sort_key(scored_video: tuple[float, str, list[int]]) -> tuple[float, str]:
    return -scored_video[0], scored_video[1]


def find_best_sequence(
    times: np.ndarray, scores: np.ndarray, within: float
) -> tuple[float, list[int]]:
    """Returns the largest sum of scores of frames in order within a window, and the frames.

    Of equal sums the one with the earliest first frame counts.

    Args:
        times: Times of the frames in increasing order, [F]; several may be equal.
        scores: Score of each frame as each step, [steps, F]; -inf where it is none.
        within: Largest time from the first to the last frame.

    Returns:
        The sum and the index of each step's frame; (-inf, []) where there is no such sequence.
    """
    best_score, best_frames = -np.inf, []
    rest = float(scores[1:].max(axis=1, initial=-np.inf).sum())
    ends = np.searchsorted(times, times + within, side="right")
    # The first frame that is later than a frame: two steps need two times.
    later = np.searchsorted(times, times, side="right")
    for start in range(len(times)):
        if not scores[0, start] + rest > best_score:
            continue
        score, frames = _find_from(start, int(ends[start]), later, scores)
        if score > best_score:
            best_score, best_frames = score, frames
    return best_score, best_frames


def _find_from(
    start: int, end: int, later: np.ndarray, scores: np.ndarray
) -> tuple[float, list[int]]:
    """Returns the best sequence that starts with frame `start` and ends before frame `end`.

    `totals[step][i]` is the best sum of the steps so far whose last frame is i.
    """
    num_frames = end - start
    earlier = np.searchsorted(later[start:end], np.arange(start, end), side="right")
    total = np.full(num_frames, -np.inf)
    total[0] = scores[0, start]
    previous_frames = []
    for step in range(1, len(scores)):
        best_until = np.concatenate([[-np.inf], np.maximum.accumulate(total)])
        index_until = _find_argmax_until(total)
        # Frames before `earlier[i]` have times below that of frame i.
        previous_frames.append(index_until[earlier])
        total = best_until[earlier] + scores[step, start:end]
    last = int(total.argmax())
    if total[last] == -np.inf:
        return -np.inf, []
    frames = [last]
    for previous in reversed(previous_frames):
        frames.append(int(previous[frames[-1]]))
    return float(total[last]), [start + frame for frame in reversed(frames)]


def _find_argmax_until(values: np.ndarray) -> np.ndarray:
    """Returns the index of the largest of the first n values, for n = 0 (0) to all of them."""
    largest = np.maximum.accumulate(values)
    is_new = np.concatenate([[True], largest[1:] > largest[:-1]])
    return np.concatenate([[0], np.maximum.accumulate(np.where(is_new, np.arange(len(values)), 0))])


def _is_settled(
    all_scores: Sequence[np.ndarray],
    num_candidates: int,
    num_rows: int,
    best: Sequence[tuple[float, str, list[int]]],
    wanted: int,
) -> bool:
    """Tells whether frames that are no candidates could not change the answer.

    A sequence with such a frame scores at most the last candidate's score in its step and the best
    score in the others.
    """
    if num_candidates >= num_rows:
        return True
    if len(best) < wanted or any(len(scores) < num_candidates for scores in all_scores):
        # Without a filter, fewer hits than candidates come from an approximate index. With one,
        # the next round asks for all rows that pass it.
        return False
    highest = [float(scores[0]) for scores in all_scores]
    lowest = [float(scores[-1]) for scores in all_scores]
    bound = max(sum(highest) - high + low for high, low in zip(highest, lowest, strict=True))
    return best[-1][0] > bound


def _make_result(
    searcher: Searcher,
    rank: int,
    video: str,
    frames: Frames,
    chosen: Sequence[int],
    score: float,
) -> SequenceResult:
    """Returns a video's result with the metadata of its frames."""
    ids = [frames.ids[index] for index in chosen]
    rows = searcher.store.fetch(ids)
    results = [
        Result(step + 1, id, float(frames.scores[step, index]), row)
        for step, (id, index, row) in enumerate(zip(ids, chosen, rows, strict=True))
    ]
    return SequenceResult(rank, video, score, results)
