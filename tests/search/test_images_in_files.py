"""Images inside Parquet and tar files: embedded, queried, shown and re-ranked like any other."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beit3.search.embed import embed
from beit3.search.preparing import EmbedOptions
from beit3.search.query import Query, Searcher, rerank_results
from beit3.search.rerank import load_reranker
from beit3.search.sheet import write_sheet
from beit3.search.stores.uri import open_store
from tests.search.embed_inputs import write_images, write_weights


def write_parquet(path: Path, images: list[Path]) -> None:
    contents = [image.read_bytes() for image in images]
    captions = ["red cubes"] * len(images)
    pq.write_table(pa.table({"image": contents, "caption": captions}), path, row_group_size=2)


def write_tar(path: Path, images: list[Path]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(images):
            tar.add(image, f"{number}.png")
            member = tarfile.TarInfo(f"{number}.txt")
            member.size = len(b"red cubes")
            tar.addfile(member, io.BytesIO(b"red cubes"))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_images_in_files_are_like_others(tmp_path, kind):
    weights = write_weights(tmp_path / "weights", matching=True)
    images = sorted(write_images(tmp_path / "images", 5).rglob("*.png"))
    file = tmp_path / f"photos.{kind}"
    {"parquet": write_parquet, "tar": write_tar}[kind](file, images)
    embed(weights, [file], tmp_path / "v", options=EmbedOptions(precision="float32"))
    searcher = Searcher(open_store(str(tmp_path / "v")))

    for row in searcher.search(Query("red cubes"), k=5):
        image = searcher.locate_image(row.metadata)
        best = searcher.search(Query(image=image), k=1)[0]
        assert best.id == row.id and best.score > 0.999

    results = searcher.search(Query("red cubes"), k=5)
    page = write_sheet(tmp_path / "hits.html", results, searcher.locate_image, title="red cubes")
    assert page.read_text().count("data:image/jpeg;base64,") == 5

    reranker = load_reranker(str(weights))
    reranked = rerank_results(results, reranker, Query("red cubes"), searcher.locate_image)
    ids = [result.id for result in results]
    scores = reranker.score(["red cubes"] * 5, images)
    in_files = [
        reranker.score(["red cubes"], [searcher.locate_image(row.metadata)])
        for row in sorted(results, key=lambda row: row.id)
    ]
    assert sorted(result.id for result in reranked) == sorted(ids)
    assert [float(score[0]) for score in in_files] == pytest.approx(scores.tolist(), abs=1e-5)
    found = searcher.search(
        Query(image=searcher.locate_image(results[0].metadata)), modality="text"
    )
    query = Query(image=searcher.locate_image(results[0].metadata))
    assert rerank_results(found, reranker, query, searcher.locate_image, modality="text")
