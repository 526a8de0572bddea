"""Who is to blame and who has to wait: faults of the server, slow disks, long texts, slow JPEGs."""

import asyncio
import io
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from beit3.search.folder import open_folder
from beit3.serve import embeddings, searching, uploads
from beit3.serve.bounded_pool import BoundedPool
from beit3.serve.limits import GuardSettings
from beit3.serve.refusal import Refusal
from beit3.serve.service import Service, Settings, check_options, choose_options
from beit3.serve.uploads import MAX_SCANS, Limits, count_scans, names_files
from tests.predict.networks import make_predictor, write_image
from tests.search.toy_index import write_index
from tests.serve.client import QUESTION, Client, check_refusal, make_png, make_service, to_base64
from tests.serve.test_refusals import JSON_HEADERS, call_app, make_chunks

GOOD = {"image": to_base64(make_png()), "question": QUESTION}


@pytest.fixture(scope="module")
def indexed(root, tmp_path_factory):
    """A folder with an index of three images, and the predictor that made it."""
    folder = tmp_path_factory.mktemp("indexed")
    predictor = make_predictor("retrieval", root)
    paths = [write_image(folder / f"{number}.png", number) for number in range(3)]
    vectors = predictor.embed(images=paths)["image"]
    metadata = {"id": ["0", "1", "2"], "image_path": [path.name for path in paths]}
    metadata["year"] = [2000, 2001, 2002]
    write_index(
        folder / "vectors", vectors, metadata, image_root=str(folder), **predictor.fingerprint
    )
    return folder, predictor


def make_searching(indexed, root, **settings) -> Client:
    folder, predictor = indexed
    service = Service(Settings(limits=Limits(folders={"photos": folder}), **settings))
    service.add("retrieval", predictor)
    service.add("vqa", make_predictor("vqa", root))
    service.open_index(str(folder / "vectors"))
    service.start()
    return Client(service)


# Slow disks ---------------------------------------------------------------------------------------

NAMED = GOOD | {"image": {"name": "photos/0.png"}}


@pytest.mark.parametrize(
    ("module", "function", "call"),
    [
        (searching, "load_picture", ("GET", "/images/0", {})),
        (uploads, "read_inside", ("POST", "/v1/vqa", {"json": NAMED})),
        (embeddings, "read_request", ("POST", "/v1/embeddings", {"json": {"input": "a"}})),
    ],
    ids=["images", "folders", "embeddings"],
)
def test_what_hangs_is_given_up_while_tasks_are_answered(
    indexed, root, monkeypatch, module, function, call
):
    client = make_searching(indexed, root, timeout=2.0)
    release = threading.Event()
    original = getattr(module, function)

    def hang(*arguments):
        release.wait(20)
        return original(*arguments)

    monkeypatch.setattr(module, function, hang)
    calls = [call] * 6 + [("POST", "/v1/vqa", {"json": GOOD})]
    try:
        answers = client.request_many(calls)
    finally:
        release.set()
    assert [answer.status_code for answer in answers] == [504] * 6 + [200]
    client.service.stop()


def test_calls_beside_the_networks_are_bounded():
    pool = BoundedPool("test", 1, 2, 5.0)
    release = threading.Event()

    async def main():
        waiting = [asyncio.ensure_future(pool.run(lambda: release.wait(10))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Refusal) as refusal:
            await pool.run(int)
        release.set()
        return refusal.value.status, await asyncio.gather(*waiting), await pool.run(int)

    assert asyncio.run(main()) == (503, [True, True], 0) and pool.count == 0
    pool.stop()


def test_only_objects_in_json_name_files(tmp_path):
    limits = Limits(folders={"a": tmp_path})
    body = b'{"image": {"n\\u0061me": "a/b"}}'
    assert names_files(body, "application/json", limits)
    assert not names_files(b'{"image": "abc"}', "application/json", limits)
    assert not names_files(body, "application/json", Limits())
    assert not names_files(body, "multipart/form-data; boundary=b", limits)


def test_a_column_is_read_by_one_thread_at_a_time(indexed):
    folder = open_folder(indexed[0] / "vectors")
    metadata, running, most = folder._metadata[0], 0, 0

    class Slow:
        schema_arrow = metadata.schema_arrow

        def read(self, columns):
            nonlocal running, most
            running += 1
            most = max(most, running)
            time.sleep(0.02)
            table = metadata.read(columns=columns)
            running -= 1
            return table

    folder._metadata = [Slow()]
    with ThreadPoolExecutor(4) as threads:
        names = ["id", "image_path", "year", "id"]
        columns = list(threads.map(folder.read_column, names))
    assert most == 1 and columns[2].to_pylist() == [2000, 2001, 2002]


# Texts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("/v1/vqa", "question", GOOD),
        ("/v1/retrieval", "text", {}),
        ("/v1/embeddings", "input", {}),
        ("/search", "text", {}),
    ],
)
def test_a_text_that_would_be_cut_is_refused_everywhere(indexed, root, path, field, body):
    client = make_searching(indexed, root)
    task = "vqa" if path == "/v1/vqa" else "retrieval"
    network = client.service.models[task].predictor.task
    limit, text = network.config.text_length, "a"
    while len(network.tokenizer.encode(text + " a")) <= limit:
        text += " a"
    assert client.post(path, json=body | {field: text}).status_code == 200
    answer = client.post(path, json=body | {field: text + " a"})
    message = check_refusal(answer, 413)
    assert answer.json()["error"]["field"] == field
    assert field in message and str(limit) in message
    client.service.stop()


# Faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["make_example", "predict_examples"])
def test_a_value_error_of_ours_is_logged_and_no_fault_of_the_request(
    root, monkeypatch, caplog, function
):
    service = make_service(root, "vqa")
    client = Client(service)

    def fail(*arguments):
        raise ValueError("/secret/path is wrong")

    monkeypatch.setattr(service.models["vqa"].predictor, function, fail)
    with caplog.at_level(logging.ERROR, "beit3.serve"):
        message = check_refusal(client.post("/v1/vqa", json=GOOD), 500)
    assert "secret" not in message
    assert "Traceback" in caplog.text and "/secret/path is wrong" in caplog.text
    service.stop()


def make_broken_png() -> bytes:
    """Returns a file whose header is right and whose pixels are missing."""
    data = make_png(0, 200, 300)
    return data[: len(data) // 2]


def test_a_broken_image_is_blamed_on_its_field(indexed, root, caplog):
    client = make_searching(indexed, root)
    broken = to_base64(make_broken_png())
    bodies = {
        "/v1/vqa": ("image", GOOD | {"image": broken}),
        "/v1/embeddings": ("input", {"input": [{"image": broken}]}),
        "/search": ("image", {"image": broken}),
    }
    for path, (field, body) in bodies.items():
        answer = client.post(path, json=body)
        assert "cannot be read" in check_refusal(answer, 422)
        assert answer.json()["error"]["field"] == field
    assert "Traceback" not in caplog.text
    client.service.stop()


def test_wrong_queries_name_their_field(indexed, root):
    client = make_searching(indexed, root)
    wrong = {"where": "year >=", "group_by": "shade", "modality": "text", "id": "nothing"}
    for field, value in wrong.items():
        query = {} if field == "id" else {"text": "red"}
        answer = client.post("/search", json=query | {field: value})
        assert str(indexed[0]) not in check_refusal(answer, 422)
        assert answer.json()["error"]["field"] == field
    client.service.stop()


# JPEG ---------------------------------------------------------------------------------------------


def make_jpeg(**options) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 48), 80).convert("RGB").save(file, "JPEG", **options)
    return file.getvalue()


def add_scans(jpeg: bytes, count: int) -> bytes:
    """Repeats the last scan of a JPEG."""
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + last * count + jpeg[-2:]


def test_scans_are_counted_as_decoders_meet_them():
    baseline, progressive = make_jpeg(), make_jpeg(progressive=True)
    assert count_scans(baseline, 1000) == 1
    num_scans = count_scans(progressive, 1000)
    assert num_scans == progressive.count(b"\xff\xda") > 5
    assert count_scans(add_scans(progressive, 30), 1000) == num_scans + 30
    assert count_scans(add_scans(progressive, 30), 20) == 20
    with_thumbnail = make_jpeg(comment=b"\xff\xda" * 200)
    assert count_scans(with_thumbnail, 1000) == 1, "a comment is no scan"
    assert count_scans(baseline + b"\xff\xda" * 500, 1000) == 1, "nor is a video behind the image"
    assert count_scans(make_jpeg(restart_marker_blocks=1), 1000) == 1
    for length in range(0, len(progressive), 97):
        assert count_scans(progressive[:length], 1000) <= num_scans


def test_a_jpeg_of_very_many_scans_is_refused(served):
    progressive = make_jpeg(progressive=True)
    body = GOOD | {"image": to_base64(add_scans(progressive, MAX_SCANS))}
    assert f"more than {MAX_SCANS} scans" in check_refusal(served.post("/v1/vqa", json=body), 413)
    assert served.post("/v1/vqa", json=GOOD | {"image": to_base64(progressive)}).status_code == 200


# A full queue -------------------------------------------------------------------------------------


def test_a_full_queue_refuses_before_the_body_is_read(root):
    service = make_service(root, "vqa", settings=Settings(max_queue=4))
    client = Client(service, GuardSettings())
    service.models["vqa"].batcher.count = 4
    sent, num_read = call_app(client, make_chunks(10, 3), JSON_HEADERS)
    assert sent[0]["status"] == 503 and num_read == 0
    assert (b"connection", b"close") not in sent[0]["headers"], "a small body is thrown away"
    for header in ((b"content-length", b"9999999"), (b"transfer-encoding", b"chunked")):
        sent, num_read = call_app(client, make_chunks(10, 3), [*JSON_HEADERS, header])
        assert sent[0]["status"] == 503 and num_read == 0
        assert (b"connection", b"close") in sent[0]["headers"]
    service.models["vqa"].batcher.count = 0
    assert client.post("/v1/vqa", json=GOOD).status_code == 200
    text = client.get("/metrics").text
    assert 'beit3_requests_total{endpoint="/v1/vqa",status="503"} 3.0' in text
    service.stop()


# What is served -----------------------------------------------------------------------------------


def test_each_network_and_the_index_are_described_in_a_line(indexed, root):
    client = make_searching(indexed, root)
    assert client.service.describe() == [
        "retrieval: retrieval at /v1/retrieval/retrieval",
        "vqa: vqa at /v1/vqa/vqa",
        "index: 3 rows at /search, by retrieval",
    ]
    client.service.stop()


def test_an_index_alone_is_served_beside_the_weights_that_ship(monkeypatch):
    from beit3.cli.serve import serve
    from beit3.serve import server
    from beit3.weights import names

    calls = []
    monkeypatch.setattr(server, "serve", lambda *words, **options: calls.append((words, options)))
    monkeypatch.setattr(names, "list_shipped", lambda: ["world/vqa"])
    serve(index="somewhere")
    assert calls[0][0][:2] == ({"world-vqa": "world/vqa"}, "somewhere")
    options = {"text_model": "a.spm", "precision": "float32"}
    assert choose_options("world/vqa", options) == {"precision": "float32"}
    assert choose_options("elsewhere/file.pth", options) == options


def test_options_that_no_served_weights_would_take_are_refused():
    options = {"text_model": "a.spm", "precision": "float32"}
    with pytest.raises(ValueError, match="text_model: the weights that ship"):
        check_options({"vqa": "world/vqa"}, "", options)
    check_options({"vqa": "world/vqa"}, "", {"precision": "float32", "text_model": None})
    check_options({"vqa": "world/vqa", "file": "elsewhere/file.pth"}, "", options)
    check_options({"vqa": "world/vqa"}, "an index", options)  # its weights may take them
