"""Served answers equal the predictor's; models, embeddings, search, images, readiness, metrics."""

import base64
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from beit3.images import open_image
from beit3.search.query import Searcher
from beit3.search.stores.exact import ExactStore
from beit3.serve.limits import GuardSettings
from beit3.serve.service import Service, Settings, format_prediction, parse_weights
from beit3.serve.uploads import Limits
from beit3.weights.store import save_weights
from tests.predict.networks import assert_same, make_pixels, make_predictor, make_task, write_image
from tests.search.toy_index import write_index
from tests.serve.client import (
    QUESTION,
    Client,
    check_refusal,
    make_png,
    make_service,
    read_pixels,
    to_base64,
)

# Predictions --------------------------------------------------------------------------------------


def test_forms_and_json_are_answered_as_by_the_predictor(served):
    data = make_png()
    expected = served.service.models["vqa"].predictor(data, QUESTION)
    bodies = {
        "form": {"files": {"image": ("a.png", data)}, "data": {"question": QUESTION}},
        "base64": {"json": {"image": to_base64(data), "question": QUESTION}},
        "data URI": {
            "json": {"image": f"data:image/png;base64,{to_base64(data)}", "question": QUESTION}
        },
    }
    for name, body in bodies.items():
        answer = served.post("/v1/vqa", **body)
        assert answer.status_code == 200, (name, answer.text)
        content = answer.json()
        assert (content["model"], content["task"]) == ("vqa", "vqa") and content["seconds"] > 0
        assert_same(content["predictions"], expected)
        assert answer.headers["content-type"] == "application/json"


def test_a_text_is_tokenized_once(root, monkeypatch):
    client = Client(make_service(root, "vqa"))
    tokenizer = client.service.models["vqa"].predictor.task.tokenizer
    encode, texts = tokenizer.encode, []

    def record(text, *options):
        texts.append(text)
        return encode(text, *options)

    monkeypatch.setattr(tokenizer, "encode", record)
    files = {"image": ("a.png", make_png())}
    answer = client.post("/v1/vqa", files=files, data={"question": QUESTION})
    assert answer.status_code == 200 and texts == [QUESTION]
    client.service.stop()


def test_every_task_is_served_as_its_predictor_answers(served):
    inputs = {
        "vqa": {"image": make_png(1), "question": "is it red"},
        "captioning": {"image": make_png(2)},
        "coco": {"image": make_png(3)},
        "nlvr2": {"image": make_png(4), "image2": make_png(5), "statement": "both are red"},
        "retrieval": {"image": make_png(6), "text": "a red ball"},
    }
    for task, values in inputs.items():
        predictor = served.service.models[task].predictor
        expected = [format_prediction(value) for value in predictor(**values)]
        body = {
            name: to_base64(value) if isinstance(value, bytes) else value
            for name, value in values.items()
        }
        for path in (f"/v1/{task}", f"/v1/{task}/{task}"):
            answer = served.post(path, json=body)
            assert answer.status_code == 200, answer.text
            assert_same(answer.json()["predictions"], json.loads(json.dumps(expected)))


def test_requests_at_once_are_batched_and_each_gets_its_own_answer(root):
    service = make_service(root, "vqa")
    client = Client(service)
    questions = [QUESTION, "is there a red ball", "how many", "what is left of the blue square ?"]
    calls, expected = [], []
    for number in range(24):
        data, question = make_png(number), questions[number % 4]
        expected.append(service.models["vqa"].predictor(data, question))
        body = {"image": to_base64(data), "question": question}
        calls.append(("POST", "/v1/vqa", {"json": body}))
    for answer, predictions in zip(client.request_many(calls), expected, strict=True):
        assert_same(answer.json()["predictions"], predictions)
    metrics = client.get("/metrics").text
    service.stop()
    (count,) = [
        float(line.split()[-1])
        for line in metrics.splitlines()
        if line.startswith("beit3_batch_size_count")
    ]
    assert count <= 12, "24 requests at once are fewer batches"
    assert 'beit3_requests_total{endpoint="/v1/vqa",status="200"} 24.0' in metrics
    assert 'beit3_waiting{model="vqa"} 0.0' in metrics and "beit3_ready 1.0" in metrics


def test_boxes_are_corners_in_pixels_of_the_image():
    prediction = {"objects": [{"box": [1, 2, 10, 20], "label": 0}], "height": 50}
    served = format_prediction(prediction)
    assert served["objects"][0]["box"] == [1, 2, 11, 22] and served["height"] == 50
    assert prediction["objects"][0]["box"] == [1, 2, 10, 20]


def test_attention_of_words_comes_where_it_is_asked_for(served):
    body = {"image": to_base64(make_png()), "question": QUESTION}
    attention = served.post("/v1/vqa?attention=true", json=body).json()["attention"]
    maps = np.array(attention["maps"])
    predictor = served.service.models["vqa"].predictor
    inspection = predictor.inspect(make_png(), QUESTION, layers=(-2, -1), attention=True)
    assert attention["words"] == list(inspection.words)
    assert maps.shape == (len(inspection.words), *inspection.grid)
    assert np.allclose(maps, inspection.get_word_attention(), atol=1e-5)
    assert "attention" not in served.post("/v1/vqa?attention=false", json=body).json()
    captioned = served.post("/v1/captioning?attention=1", json={"image": body["image"]}).json()
    assert len(captioned["attention"]["maps"]) == len(captioned["attention"]["words"])
    message = check_refusal(served.post("/v1/coco?attention=1", json={"image": ""}), 422)
    assert "no attention" in message
    check_refusal(served.post("/v1/vqa?attention=maybe", json=body), 422)


def test_images_of_a_named_folder_can_be_named(root, tmp_path):
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    path = write_image(tmp_path / "photos" / "deep" / "a.png", 7)
    limits = Limits(folders={"photos": tmp_path / "photos"})
    service = make_service(root, "captioning", settings=Settings(limits=limits))
    client = Client(service)
    answer = client.post("/v1/captioning", json={"image": {"name": "photos/deep/a.png"}})
    assert answer.status_code == 200, answer.text
    assert_same(answer.json()["predictions"], service.models["captioning"].predictor(path))
    service.stop()


# Several weights ----------------------------------------------------------------------------------


def test_several_weights_of_one_task_are_told_apart_by_name(root):
    service = Service()
    predictors = {}
    for seed, name in enumerate(("first", "second")):
        predictor = make_predictor("captioning", root)
        predictor.task.init_weights(seed)
        predictors[name] = predictor
        service.add(name, predictor)
    service.start()
    client = Client(service)
    body = {"image": to_base64(make_png())}
    for name, predictor in predictors.items():
        answer = client.post(f"/v1/{name}/captioning", json=body).json()
        assert answer["model"] == name
        assert_same(answer["predictions"], predictor(make_png()))
    assert client.post("/v1/captioning", json=body).json()["model"] == "first"
    message = check_refusal(client.post("/v1/third/captioning", json=body), 404)
    assert "/v1/first/captioning" in message
    with pytest.raises(ValueError, match="two weights are named first"):
        service.add("first", predictors["first"])
    for name in ("models", "a/b", "", "-x"):
        with pytest.raises(ValueError, match="no name of weights"):
            service.add(name, predictors["first"])
    service.stop()


def test_weights_are_loaded_by_name_and_path(root, tmp_path):
    save_weights(make_task("vqa", root), tmp_path / "run-1" / "best")
    weights = parse_weights([str(tmp_path / "run-1"), f"mine={tmp_path / 'run-1' / 'best'}"])
    assert list(weights) == ["run-1", "mine"]
    service = Service()
    assert service.state == "loading"
    service.load(weights)
    assert service.state == "ready" and list(service.models) == ["run-1", "mine"]
    service.stop()
    with pytest.raises(ValueError, match="two weights are named run-1"):
        parse_weights([str(tmp_path / "run-1"), str(tmp_path / "run-1" / "best")])
    with pytest.raises(ValueError, match="no weights at nowhere"):
        parse_weights(["a=nowhere"])


def test_untrained_and_inputless_weights_are_refused(root):
    from dataclasses import replace

    service = Service()
    predictor = make_predictor("vqa", root)
    predictor.report = replace(predictor.report, fresh=("head.weight",))
    with pytest.raises(ValueError, match="untrained"):
        service.add("vqa", predictor)
    with pytest.raises(ValueError, match="takes no raw inputs"):
        service.add("pretrain", make_predictor("pretrain", root))
    service.stop()


def test_models_are_described_with_their_inputs(served):
    listed = served.get("/v1/models").json()
    assert listed["object"] == "list" and listed["index"] is None
    described = {model["id"]: model for model in listed["data"]}
    assert described["vqa"]["inputs"] == [
        {"name": "image", "kind": "image", "required": True},
        {"name": "question", "kind": "text", "required": True},
    ]
    assert [field["kind"] for field in described["nlvr2"]["inputs"]] == ["image", "image", "text"]
    assert not any(field["required"] for field in described["retrieval"]["inputs"])
    assert described["retrieval"]["embeds"] and not described["vqa"]["embeds"]
    assert described["vqa"]["path"] == "/v1/vqa/vqa" and described["coco"]["classes"]


# Embeddings ---------------------------------------------------------------------------------------


def test_embeddings_have_the_shape_that_openai_clients_expect(served):
    texts, data = ["a red ball", "two blue squares left of a circle"], make_png(9)
    predictor = served.service.models["retrieval"].predictor
    expected = predictor.embed(images=[data], texts=texts)
    inputs = [texts[0], {"image": f"data:image/png;base64,{to_base64(data)}"}, texts[1]]
    answer = served.post("/v1/embeddings", json={"input": inputs, "model": "retrieval"}).json()
    assert answer["object"] == "list" and answer["model"] == "retrieval"
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    vectors = np.array([item["embedding"] for item in answer["data"]])
    rows = [expected["text"][0], expected["image"][0], expected["text"][1]]
    assert np.allclose(vectors, rows, atol=1e-5)
    counts = [len(predictor.task.tokenizer.encode(text)) for text in texts]
    assert answer["usage"] == {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}

    # The client of OpenAI asks for base64 unless told otherwise.
    body = {"input": texts[0], "model": "retrieval", "encoding_format": "base64", "user": "a"}
    (item,) = served.post("/v1/embeddings", json=body).json()["data"]
    decoded = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
    assert decoded.dtype == np.float32 and np.allclose(decoded, expected["text"][0], atol=1e-5)
    dimensions = {"input": "a", "dimensions": len(decoded)}
    assert served.post("/v1/embeddings", json=dimensions).status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "input is missing"),
        ({"input": []}, "0 items"),
        ({"input": ["a"] * 257}, "257 items"),
        ({"input": ""}, "empty"),
        ({"input": ["a", " "]}, "input 1 is empty"),
        ({"input": [[1, 2, 3]]}, "token ids"),
        ({"input": [1, 2]}, "token ids"),
        ({"input": None}, "null"),
        ({"input": {"picture": "x"}}, "object"),
        ({"input": {"image": "http://example.org/a.png"}}, "URL"),
        ({"input": "a", "encoding_format": "hex"}, "neither float nor base64"),
        ({"input": "a", "dimensions": 3}, "dimensions is 3"),
        ({"input": "a", "dimensions": True}, "no whole number"),
        ({"input": "a", "model": 3}, "no"),
        ({"input": "a", "stream": True}, "no field 'stream'"),
    ],
)
def test_wrong_embedding_requests_are_refused_with_a_reason(served, body, words):
    assert words in check_refusal(served.post("/v1/embeddings", json=body), 422)


def test_embeddings_need_weights_that_have_features(root, served):
    body = {"input": "a", "model": "vqa"}
    assert "retrieval" in check_refusal(served.post("/v1/embeddings", json=body), 404)
    service = make_service(root, "vqa")
    message = check_refusal(Client(service).post("/v1/embeddings", json={"input": "a"}), 404)
    assert "serve those of retrieval" in message
    service.stop()


# Search -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(root, tmp_path_factory):
    """An index of six images, beside the predictor that made it."""
    folder = tmp_path_factory.mktemp("index")
    predictor = make_predictor("retrieval", root)
    paths = [write_image(folder / f"{number}.png", number) for number in range(6)]
    vectors = predictor.embed(images=paths)["image"]
    ids = [f"a/{number} ?" for number in range(6)]
    metadata = {"id": ids, "image_path": [path.name for path in paths], "year": [*range(6)]}
    write_index(
        folder / "vectors", vectors, metadata, image_root=str(folder), **predictor.fingerprint
    )
    return folder, predictor


@pytest.fixture
def searching(index):
    folder, predictor = index
    service = Service()
    service.add("retrieval", predictor)
    service.open_index(str(folder / "vectors"))
    service.start()
    yield Client(service)
    service.stop()


def test_searches_are_answered_as_by_the_searcher(searching, index):
    folder, predictor = index
    searcher = Searcher(ExactStore(folder / "vectors"), predictor)
    image = open_image(folder / "2.png")
    cases = [
        ({"text": "a red ball", "k": 3}, {"query": "a red ball", "k": 3}),
        ({"text": "a red ball", "where": "year >= 2", "offset": 1}, None),
        ({"image": to_base64((folder / "2.png").read_bytes()), "k": 2}, None),
        ({"id": "a/1 ?", "k": 2}, None),
    ]
    from beit3.search.query import Query

    queries = [
        (Query(text="a red ball"), {"k": 3}),
        (Query(text="a red ball"), {"where": "year >= 2", "offset": 1}),
        (Query(image=image), {"k": 2}),
        (Query(id="a/1 ?"), {"k": 2}),
    ]
    for (body, _), (query, options) in zip(cases, queries, strict=True):
        answer = searching.post("/search", json=body)
        assert answer.status_code == 200, answer.text
        results = answer.json()["results"]
        expected = searcher.search(query, **options)
        assert [(result["rank"], result["id"]) for result in results] == [
            (result.rank, result.id) for result in expected
        ]
        assert [result["score"] for result in results] == pytest.approx(
            [result.score for result in expected], abs=1e-4
        )
        assert [result["metadata"]["year"] for result in results] == [
            result.metadata["year"] for result in expected
        ]
    described = searching.get("/v1/models").json()["index"]
    assert described["rows"] == 6 and described["model"] == "retrieval"
    assert "year" in described["columns"] and str(folder) not in json.dumps(described)


def test_a_query_waits_with_the_file_of_its_image_not_its_pixels(searching):
    from beit3.serve.searching import read_query

    data = make_png()
    _, query = read_query({"image": to_base64(data)}, searching.service.find_index(), Limits())
    assert query.image == data


def test_images_of_results_are_fetched_by_id(searching, index):
    folder, _ = index
    (result,) = searching.post("/search", json={"text": "red", "k": 1}).json()["results"]
    answer = searching.get(result["image_url"])
    number = int(result["metadata"]["image_path"][0])
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "private, max-age=3600"
    assert searching.get("/images/nothing").headers["cache-control"] == "no-store"
    assert (read_pixels(answer.content) == make_pixels(number)).all()
    for path in ("/images/0.png", "/images/../0.png", "/images/%2e%2e%2fetc%2fpasswd", "/images/"):
        check_refusal(searching.get(path), 404)


def test_an_image_of_the_index_that_lies_elsewhere_is_not_sent(root, tmp_path, index):
    _, predictor = index
    secret = write_image(tmp_path / "secret.png", 1)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.png").symlink_to(secret)
    (tmp_path / "images" / "text.png").write_text("no image, and nobody's business")
    paths = ["../secret.png", "link.png", str(secret), "text.png", "absent.png", ""]
    vectors = predictor.embed(images=[secret] * len(paths))["image"]
    metadata = {"id": [str(number) for number in range(len(paths))], "image_path": paths}
    write_index(
        tmp_path / "vectors",
        vectors,
        metadata,
        image_root=str(tmp_path / "images"),
        **predictor.fingerprint,
    )
    service = Service()
    service.add("retrieval", predictor)
    service.open_index(str(tmp_path / "vectors"))
    service.start()
    client = Client(service)
    for number in range(len(paths)):
        message = check_refusal(client.get(f"/images/{number}"), 404)
        assert str(tmp_path) not in message
    service.stop()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "nothing to search for"),
        ({"text": " "}, "nothing to search for"),
        ({"text": "red", "k": 0}, "1 to 1000"),
        ({"text": "red", "k": 10**9}, "1 to 1000"),
        ({"text": "red", "k": "ten"}, "whole number"),
        ({"text": "red", "k": 1.5}, "whole number"),
        ({"text": "red", "offset": -1}, "0 to"),
        ({"text": "red", "where": "year >="}, "year"),
        ({"text": "red", "where": "shade = 'red'"}, "shade"),
        ({"text": "red", "group_by": "shade"}, "no column 'shade'"),
        ({"text": "red", "modality": "text"}, "text vectors"),
        ({"text": "red", "modality": "sound"}, "sound"),
        ({"id": "nothing"}, "nothing"),
        ({"text": 3}, "not a text"),
        ({"image": "https://example.org/x.jpg"}, "URL"),
        ({"text": "red", "limit": 3}, "no field 'limit'"),
    ],
)
def test_wrong_searches_are_refused_with_a_reason(searching, index, body, words):
    message = check_refusal(searching.post("/search", json=body), 422)
    assert words in message and str(index[0]) not in message


def test_without_an_index_there_is_no_search(served):
    assert "--index" in check_refusal(served.post("/search", json={"text": "red"}), 404)
    check_refusal(served.get("/images/a"), 404)


def test_an_index_without_its_weights_is_searched_by_id(index, root):
    folder, predictor = index
    service = make_service(root, "vqa")
    service.open_index(str(folder / "vectors"))
    client = Client(service)
    results = client.post("/search", json={"id": "a/1 ?", "k": 2}).json()["results"]
    expected = Searcher(ExactStore(folder / "vectors"), predictor)
    from beit3.search.query import Query

    assert [result["id"] for result in results] == [
        result.id for result in expected.search(Query(id="a/1 ?"), k=2)
    ]
    assert "by id alone" in check_refusal(client.post("/search", json={"text": "red"}), 422)
    service.stop()


def test_an_index_brings_its_own_weights(root, tmp_path):
    weights = tmp_path / "weights-of-index"
    save_weights(make_task("retrieval", root), weights)
    predictor = make_predictor("retrieval", root)
    path = write_image(tmp_path / "a.png", 1)
    import pyarrow as pa

    from beit3.search.folder import write_shard
    from beit3.search.manifest import Manifest, write_manifest

    vectors = predictor.embed(images=[path])
    folder = tmp_path / "vectors"
    shard = write_shard(folder, 0, vectors, pa.table({"id": ["a"]}), dtype="float32")
    manifest = Manifest(
        dim=vectors["image"].shape[1],
        fingerprint=predictor.fingerprint,
        weights=str(weights),
        dtype="float32",
        modalities=("image",),
        image_root="",
        shards=(shard,),
    )
    write_manifest(folder, manifest)
    service = Service()
    service.load({}, str(folder))
    assert list(service.models) == ["weights-of-index"]
    client = Client(service)
    (result,) = client.post("/search", json={"text": "red"}).json()["results"]
    assert result["id"] == "a" and result["image_url"] is None
    assert client.post("/v1/embeddings", json={"input": "red"}).status_code == 200
    shutil.rmtree(weights)
    service.stop()


# The server ---------------------------------------------------------------------------------------


def test_readiness_follows_loading_and_draining(root):
    service = Service()
    client = Client(service)
    assert client.get("/healthz").json()["status"] == "ok"
    loading = client.get("/readyz")
    assert loading.status_code == 503 and loading.json() == {"status": "loading"}
    answer = client.post("/v1/vqa", json={})
    assert "loading" in check_refusal(answer, 503) and answer.headers["retry-after"]
    service.add("captioning", make_predictor("captioning", root))
    service.start()
    assert client.get("/readyz").status_code == 200
    service.drain()
    draining = client.get("/readyz")
    assert draining.status_code == 503 and draining.json() == {"status": "draining"}
    assert draining.headers["connection"] == "close"
    body = {"image": to_base64(make_png())}
    assert client.post("/v1/captioning", json=body).status_code == 200, "it is still answered"
    assert "beit3_ready 0.0" in client.get("/metrics").text
    service.stop()
    check_refusal(client.post("/v1/captioning", json=body), 503)


def test_a_failed_load_is_never_ready(tmp_path):
    service = Service()
    with pytest.raises(ValueError, match="no weights at"):
        service.load({"a": str(tmp_path / "absent")})
    assert service.state == "failed"
    service.stop()


def test_the_token_is_asked_for(root):
    service = make_service(root, "captioning")
    client = Client(service, GuardSettings(token="open sesame".replace(" ", "-")))
    body = {"json": {"image": to_base64(make_png())}}
    wrong: list[dict] = [{}, {"authorization": "Bearer wrong"}, {"authorization": "open-sesame"}]
    wrong += [{"authorization": "Basic open-sesame"}, {"authorization": "Bearer "}]
    wrong += [{"authorization": "Bearer open-sesame2"}]
    for headers in wrong:
        answer = client.post("/v1/captioning", headers=headers, **body)
        check_refusal(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/images/a"):
        check_refusal(client.get(path), 401)
    for path in ("/healthz", "/readyz", "/", "/page/app.js"):
        assert client.get(path).status_code == 200
    right = {"authorization": "Bearer open-sesame"}
    assert client.post("/v1/captioning", headers=right, **body).status_code == 200
    assert client.get("/docs", headers=right).status_code == 200
    service.stop()


def test_the_page_and_the_documentation_load_nothing_from_outside(served):
    for path in ("/", "/docs"):
        answer = served.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
        assert "http://" not in answer.text and "https://" not in answer.text
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy
    assert "POST /v1/vqa" in served.get("/docs").text
    assert served.get("/page/index.html").status_code == 200
    for name in ("absent.js", "..%2fapp.py", "%2e%2e/app.py", "app.py", "../app.py"):
        check_refusal(served.get(f"/page/{name}"), 404)


def test_openapi_has_an_endpoint_for_each_task_with_its_own_inputs(served):
    document = served.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    content = document["paths"]["/v1/vqa"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    for schema in (value["schema"] for value in content.values()):
        assert set(schema["properties"]) == {"image", "question"} == set(schema["required"])
    statement = document["paths"]["/v1/nlvr2"]["post"]["requestBody"]["content"]
    assert "image2" in statement["application/json"]["schema"]["properties"]
    ids = [
        operation["operationId"]
        for operations in document["paths"].values()
        for operation in operations.values()
    ]
    assert len(ids) == len(set(ids)) and "/search" not in document["paths"]


def test_a_server_for_this_machine_refuses_other_names(root):
    service = make_service(root, "captioning")
    client = Client(service, GuardSettings(local_hosts_only=True))
    for host in ("127.0.0.1:8000", "localhost", "[::1]:8000", "LOCALHOST:80"):
        assert client.get("/healthz", headers={"host": host}).status_code == 200
    for host in ("example.org", "127.0.0.1.example.org", "10.0.0.1:8000"):
        check_refusal(client.get("/healthz", headers={"host": host}), 403)
    service.stop()


def test_errors_of_ours_are_not_described(root, monkeypatch):
    service = make_service(root, "captioning")
    client = Client(service)

    def fail(*args):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(service.models["captioning"], "prepare", fail)
    answer = client.post("/v1/captioning", json={"image": to_base64(make_png())})
    message = check_refusal(answer, 500)
    assert "secret" not in message
    assert "content-security-policy" in answer.headers
    metrics = client.get("/metrics").text
    assert 'beit3_requests_total{endpoint="/v1/captioning",status="500"} 1.0' in metrics
    monkeypatch.undo()
    answer = client.post("/v1/captioning", json={"image": to_base64(make_png())})
    assert answer.status_code == 200
    service.stop()


def test_an_answer_that_is_no_json_is_not_blamed_on_the_request(root, monkeypatch):
    service = make_service(root, "captioning")
    client = Client(service)
    prediction = [{"caption": "a", "score": float("nan")}]
    monkeypatch.setattr(
        service.models["captioning"].predictor, "predict_examples", lambda items: [prediction]
    )
    check_refusal(client.post("/v1/captioning", json={"image": to_base64(make_png())}), 500)
    service.stop()


def test_a_caption_without_words_has_attention_without_maps(root, monkeypatch):
    service = make_service(root, "captioning")
    monkeypatch.setattr(
        service.models["captioning"].predictor,
        "predict_examples",
        lambda items: [[{"caption": ""}] for _ in items],
    )
    body = {"image": to_base64(make_png())}
    answer = Client(service).post("/v1/captioning?attention=true", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["attention"] == {"words": [], "maps": []}
    service.stop()


def test_attention_has_what_is_left_of_the_time(root, monkeypatch):
    service = make_service(root, "vqa", settings=Settings(timeout=1.0))
    batcher = service.models["vqa"].batcher
    timeouts = []
    submit = batcher.submit

    async def remember(prepare, *, timeout=None, **options):
        timeouts.append(timeout)
        return await submit(prepare, timeout=timeout, **options)

    monkeypatch.setattr(batcher, "submit", remember)
    body = {"image": to_base64(make_png()), "question": QUESTION}
    Client(service).post("/v1/vqa?attention=true", json=body)
    assert timeouts[0] is None and 0 <= timeouts[1] < 1.0
    service.stop()


def test_a_rotated_photograph_is_turned_upright(served, tmp_path):
    image = Image.fromarray(make_pixels(3, 40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    (prediction,) = served.post("/v1/coco", json={"image": to_base64(data)}).json()["predictions"]
    assert (prediction["height"], prediction["width"]) == (20, 40)
