"""Videos in which several things happen in order."""

from itertools import product

import numpy as np
import pytest

from beit3.search import sequence
from beit3.search.query import Query
from beit3.search.sequence import find_best_sequence, search_sequence
from tests.search.toy_index import encode, make_searcher, make_unit_vectors

STEPS = ["a man opens a door", "a dog runs out", "it barks"]


def find_slowly(times, scores, within):
    """Returns the largest sum over all choices of frames, and the first choice that has it."""
    best, frames = -np.inf, []
    for choice in product(range(len(times)), repeat=len(scores)):
        chosen_times = [times[frame] for frame in choice]
        in_order = all(a < b for a, b in zip(chosen_times, chosen_times[1:], strict=False))
        if not in_order or chosen_times[-1] - chosen_times[0] > within:
            continue
        total = sum(scores[step][frame] for step, frame in enumerate(choice))
        if total > best + 1e-12:
            best, frames = total, list(choice)
    return best, frames


@pytest.mark.parametrize("num_steps", [2, 3, 4])
def test_best_sequence_equals_the_slow_way(num_steps):
    rng = np.random.default_rng(num_steps)
    for _ in range(150 if num_steps < 4 else 60):
        num_frames = int(rng.integers(1, 9))
        times = np.sort(rng.integers(0, 12, num_frames)).astype(float)
        scores = rng.normal(size=(num_steps, num_frames))
        scores[rng.random(scores.shape) < 0.3] = -np.inf
        within = float(rng.choice([1, 3, 6, 20]))
        expected, _ = find_slowly(times, scores, within)
        score, frames = find_best_sequence(times, scores, within)
        assert score == pytest.approx(expected) or (score == expected == -np.inf)
        assert bool(frames) == np.isfinite(expected)
        if frames:
            assert sum(scores[step, frame] for step, frame in enumerate(frames)) == pytest.approx(
                score
            )
            assert np.all(np.diff(times[frames]) > 0) and np.ptp(times[frames]) <= within


@pytest.fixture(scope="module")
def frames():
    rng = np.random.default_rng(7)
    vectors = make_unit_vectors(rng, 120)
    # Frames in any order, some at the same time, some without a video or a time.
    videos = [None if index == 5 else f"v{index % 9}" for index in range(120)]
    times = [
        None if index == 6 else float(time) for index, time in enumerate(rng.integers(0, 40, 120))
    ]
    metadata = {
        "id": [f"f{index}" for index in range(120)],
        "image_path": [f"{index}.jpg" for index in range(120)],
        "video": videos,
        "time": times,
        "clip": videos,
        "start": times,
        "kind": [("night", "day")[index % 2] for index in range(120)],
    }
    return vectors, metadata


@pytest.fixture(scope="module")
def searcher(frames, tmp_path_factory):
    return make_searcher(tmp_path_factory.mktemp("frames") / "v", *frames)


def rank_videos_slowly(frames, steps, within, keep=None):
    """Returns (score, video, ids of the frames), the best first."""
    vectors, metadata = frames
    results = []
    for video in sorted({video for video in metadata["video"] if video}):
        rows = [
            row
            for row in range(len(vectors))
            if metadata["video"][row] == video
            and metadata["time"][row] is not None
            and (keep is None or keep[row])
        ]
        rows.sort(key=lambda row: (metadata["time"][row], metadata["id"][row]))
        scores = np.array([vectors[rows] @ encode(step) for step in steps])
        score, chosen = find_slowly([metadata["time"][row] for row in rows], scores, within)
        if chosen:
            results.append((score, video, [metadata["id"][rows[index]] for index in chosen]))
    return sorted(results, key=lambda result: (-result[0], result[1]))


@pytest.mark.parametrize("num_steps", [2, 3])
@pytest.mark.parametrize("within", [2, 10, 100])
@pytest.mark.parametrize("first_candidates", [10, 1000])
def test_videos_equal_the_slow_way(
    searcher, frames, num_steps, within, first_candidates, monkeypatch
):
    monkeypatch.setattr(sequence, "FIRST_CANDIDATES", first_candidates)
    steps = STEPS[:num_steps]
    expected = rank_videos_slowly(frames, steps, within)
    for k in (1, 3, 20):
        videos, is_exact = search_sequence(searcher, steps, within=within, k=k)
        assert is_exact
        assert [video.video for video in videos] == [video for _, video, _ in expected[:k]]
        assert [[frame.id for frame in video.frames] for video in videos] == [
            ids for _, _, ids in expected[:k]
        ]
        assert [video.score for video in videos] == pytest.approx(
            [score for score, _, _ in expected[:k]], abs=1e-5
        )


def test_a_result_names_the_frame_of_each_step(searcher, frames):
    (video,), _ = search_sequence(searcher, STEPS, within=30, k=1)
    assert [frame.rank for frame in video.frames] == [1, 2, 3]
    times = [frame.metadata["time"] for frame in video.frames]
    assert times == sorted(set(times)) and {f.metadata["video"] for f in video.frames} == {
        video.video
    }
    row = video.to_row()
    assert [frame["step"] for frame in row["frames"]] == [1, 2, 3]
    assert sum(frame["score"] for frame in row["frames"]) == pytest.approx(video.score)


def test_pages_filter_and_columns(searcher, frames):
    everything, _ = search_sequence(searcher, STEPS[:2], within=20, k=20)
    page, _ = search_sequence(searcher, STEPS[:2], within=20, k=3, offset=2)
    assert [video.video for video in page] == [video.video for video in everything[2:5]]
    assert [video.rank for video in page] == [3, 4, 5]
    renamed, _ = search_sequence(
        searcher, STEPS[:2], within=20, k=20, video_column="clip", time_column="start"
    )
    assert [video.to_row() for video in renamed] == [video.to_row() for video in everything]
    days = [kind == "day" for kind in frames[1]["kind"]]
    expected = rank_videos_slowly(frames, STEPS[:2], 20, days)
    filtered, is_exact = search_sequence(
        searcher, STEPS[:2], within=20, k=20, where="kind == 'day'"
    )
    assert is_exact and [video.video for video in filtered] == [video for _, video, _ in expected]


def test_a_bounded_search_says_that_it_may_miss(searcher):
    _, is_exact = search_sequence(searcher, STEPS, within=5, k=9, max_candidates=5)
    assert not is_exact


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (STEPS[:1], {}, "at least two"),
        (STEPS[:2], {"within": 0}, "within is 0"),
        (STEPS[:2], {"k": 0}, "k is 0"),
        (STEPS[:2], {"video_column": "vide"}, "no column 'vide'; did you mean video"),
        (STEPS[:2], {"time_column": "seconds"}, "no column 'seconds'"),
        (STEPS[:2], {"time_column": "kind"}, "kind of row .* no number"),
        ([STEPS[0], Query()], {}, "nothing to search for"),
    ],
)
def test_wrong_sequences_are_refused(searcher, steps, options, message):
    with pytest.raises(ValueError, match=message):
        search_sequence(searcher, steps, **{"within": 30} | options)
