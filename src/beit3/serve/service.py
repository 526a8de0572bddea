"""The networks and the index that a server answers with, and their life: load, drain, stop."""

import logging
import re
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from beit3.files import parse_tar_member, read_tar_member
from beit3.images import open_image
from beit3.machine import count_cores
from beit3.model.beit3 import BEiT3
from beit3.predict import Predictor, load
from beit3.search.manifest import check_fingerprint
from beit3.search.query import Query, Result, Searcher
from beit3.search.stores.store import QueryError, Store, UnknownIdError
from beit3.search.stores.uri import open_store
from beit3.serve.batcher import Batcher, round_length
from beit3.serve.bounded_pool import BoundedPool
from beit3.serve.metrics import Metrics
from beit3.serve.refusal import Refusal, refuse_value_errors
from beit3.serve.schemas import InputField, list_inputs, read_record
from beit3.serve.uploads import Limits, find_inside, read_image, read_inside
from beit3.task import Example, task_name
from beit3.weights.names import find_path, find_shipped, is_there

LOGGER = logging.getLogger("beit3.serve")

FILE_THREADS = 4

OPTIONS_OF_RELEASED_FILES = ("text_model", "answers", "classes")

State = Literal["loading", "ready", "draining", "failed"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RESERVED_NAMES = frozenset({"models", "embeddings"})
"""Words of the paths below /v1 that are no weights."""

ATTENTION_LAYERS = (-2, -1)
"""Blocks whose attention is averaged."""

ATTENTION_TEXTS: Mapping[str, Callable[[dict[str, Any], dict[str, Any]], str]] = {
    "vqa": lambda record, prediction: record["text"],
    "captioning": lambda record, prediction: prediction["caption"],
}
"""Task -> the text whose words attend to the image, of a record and its best prediction."""


@dataclass(frozen=True)
class Settings:
    """How a server batches, and what it refuses.

    Args:
        max_batch: Largest number of requests that are computed together.
        max_wait: Seconds that a request waits at most for others to share a batch.
        max_queue: Largest number of requests that wait for one network.
        timeout: Seconds after which a request is given up.
        limits: What a request may hold.
    """

    max_batch: int = 32
    max_wait: float = 0.005
    max_queue: int = 256
    timeout: float = 30.0
    limits: Limits = field(default_factory=Limits)


class Model:
    """One loaded network by its name, with its inputs and its batcher."""

    def __init__(
        self, name: str, predictor: Predictor, make_batcher: Callable[..., Batcher]
    ) -> None:
        task = predictor.task
        self.name = name
        self.predictor = predictor
        self.task_name = task_name(type(task))
        self.inputs: tuple[InputField, ...] = list_inputs(task)
        if not self.inputs:
            raise ValueError(f"{name}: {self.task_name} takes no raw inputs: leave it out")
        predictor.check_trained()
        self.embeds = {field.name for field in self.inputs} == {"image", "text"}
        self.attends = self.task_name in ATTENTION_TEXTS and isinstance(task.backbone, BEiT3)
        self.searcher: Searcher | None = None
        self.batcher = make_batcher(self.run, name)

    @property
    def path(self) -> str:
        """Path of the endpoint that is of this network alone."""
        return f"/v1/{self.name}/{self.task_name}"

    def describe(self) -> dict[str, Any]:
        """Returns what clients may know of it."""
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "local",
            "name": self.name,
            "task": self.task_name,
            "path": self.path,
            "inputs": [field.to_json() for field in self.inputs],
            "attention": self.attends,
            "embeds": self.embeds,
            "classes": list(self.predictor.task.class_names)[:1000],
        }

    # In threads of the pool -----------------------------------------------------------------------

    def prepare(self, record: dict[str, Any]) -> tuple[Hashable, Example]:
        """Returns the batch key and the example of a record. Raises Refusal."""
        names = {field.record_field: field.name for field in self.inputs}
        example = self._make_example(record, names)
        return ("predict", *describe_shape(example)), example

    def prepare_features(self, record: dict[str, Any], modality: str) -> tuple[Hashable, Example]:
        """Returns the batch key and the example of an image or a text to encode by itself."""
        example = self._make_example(record, dict.fromkeys(record, "input"))
        return ("encode", modality, *describe_shape(example)), example

    def _make_example(self, record: dict[str, Any], names: Mapping[str, str]) -> Example:
        """Returns the example of a record, whose fields have other `names` in the request."""
        text_field = names.get("text", "text")
        if "text" in record:
            with refuse_value_errors(text_field):
                self.predictor.check_text_side([record])
        try:
            example = self.predictor.make_example(record)
        except ValueError:
            # The input to blame is only looked for now: a check ahead would tokenize texts twice.
            if "text" in record:
                check_text_length(self.predictor, record["text"], text_field)
            for input_field in self.inputs:
                if input_field.kind == "image":
                    image = record.get(input_field.record_field)
                    check_image(image, names.get(input_field.record_field, input_field.name))
            raise
        # Only a text without padding may have been cut.
        if "text" in record and not ("text_padding" in example and example["text_padding"].any()):
            check_text_length(self.predictor, record["text"], text_field)
        return example

    # In the network's thread ----------------------------------------------------------------------

    def run(self, key: Any, items: list[Any]) -> Sequence[Any]:
        """Computes a batch, see `Batcher`."""
        kind = key[0]
        if kind == "predict":
            return self.predictor.predict_examples(items)
        if kind == "encode":
            return list(self.predictor.encode(self.predictor.task.collate(items))[key[1]])
        if kind == "attention":
            return [self.compute_attention(*item) for item in items]
        if kind == "search":
            assert self.searcher is not None
            return run_search(self.searcher, key, items)
        raise AssertionError(key)

    def compute_attention(self, image: bytes, text: str) -> dict[str, Any]:
        """Returns how much each word of a text attends to each patch of an image.

        The mean over the heads of the last layers: `words` [L] and `maps` [L][h][w].
        """
        backbone = self.predictor.task.backbone
        assert isinstance(backbone, BEiT3)
        layers = ATTENTION_LAYERS[-backbone.config.depth :]
        inspection = self.predictor.inspect(image, text, layers=layers, attention=True)
        maps = inspection.get_word_attention().astype(np.float64).round(6)
        return {"words": list(inspection.words), "maps": maps.tolist()}


def describe_shape(example: Example) -> tuple[Hashable, ...]:
    """Returns what examples of one batch must share: keys, shapes of images, length of the text."""
    shape: list[Hashable] = [tuple(sorted(example))]
    padding = example.get("text_padding")
    if padding is not None:
        shape.append(round_length(int((~padding).sum())))
    image = example.get("image")
    if image is not None:
        shape.append(tuple(image.shape))
    return tuple(shape)


def check_text_length(predictor: Predictor, text: str, field: str) -> None:
    """Raises Refusal 413 for a text of which the weights would read only the beginning."""
    task = predictor.task
    with refuse_value_errors(field):
        num_ids = len(task.tokenizer.encode(text))
    limit = task.config.text_length
    if num_ids > limit:
        raise Refusal(
            413,
            f"{field} has {num_ids} token ids, and the weights read {limit}: shorten it",
            field=field,
        )


def check_image(image: Any, field: str) -> None:
    """Raises Refusal 422 for an image that cannot be decoded."""
    if image is not None:
        with refuse_value_errors(field):
            open_image(image)


def run_search(searcher: Searcher, key: Any, queries: list[Query]) -> list[list[Result]]:
    """Answers queries that share the options in their key. Raises Refusal for a wrong query."""
    _, k, offset, where, group_by, modality = key
    try:
        return searcher.search_many(
            queries, k=k, offset=offset, where=where, group_by=group_by, modality=modality
        )
    except QueryError as error:
        field = "id" if isinstance(error, UnknownIdError) else ""
        raise Refusal(422, str(error), field=field, is_quoted=True) from error
    except ValueError:
        for query in queries:
            check_image(query.image, "image")
        raise


class Index:
    """The search index: what is asked of it goes through the batcher of its network."""

    def __init__(self, store: Store, searcher: Searcher, batcher: Batcher, model: str) -> None:
        self.store = store
        self.searcher = searcher
        self.batcher = batcher
        self.model = model
        """Name of its network, "" without one: rows are looked for by id alone then."""

    def describe(self) -> dict[str, Any]:
        """Returns what clients may know of it."""
        return {
            "rows": self.store.num_rows,
            "modalities": list(self.store.modalities),
            "columns": dict(self.store.columns),
            "model": self.model or None,
        }

    def read_picture(self, id: str, max_bytes: int) -> bytes | None:
        """Returns the file of a row's image, None where there is none inside the index's root."""
        try:
            (row,) = self.store.fetch([id])
        except UnknownIdError:
            return None
        inside = row.get("image_path") or ""
        root = self.searcher.image_root
        if not inside or not root:
            return None
        tar, start, size = parse_tar_member(inside)
        if not tar:
            return read_inside(Path(root), inside, max_bytes)
        path = find_inside(Path(root), tar)
        if path is None or size > max_bytes:
            return None
        try:
            return read_tar_member(str(path), start, size)
        except (OSError, ValueError):
            return None


class Service:
    """The networks by name, the index, and whether requests are taken.

    Args:
        settings: See `Settings`.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.metrics = Metrics()
        self.models: dict[str, Model] = {}
        self.index: Index | None = None
        self.state: State = "loading"
        self.metrics.ready.set_function(lambda: float(self.state == "ready"))
        self.pool = ThreadPoolExecutor(max(2, count_cores()), thread_name_prefix="beit3-prepare")
        """Prepares requests of the networks: nothing else may keep it busy."""
        timeout, num_waiting = self.settings.timeout, self.settings.max_queue
        self.files = BoundedPool("beit3-files", FILE_THREADS, num_waiting, timeout)
        """Reads images of the index and of the named folders, which may be on a slow disk."""
        self.bodies = BoundedPool("beit3-bodies", 1, num_waiting, timeout)
        """Reads bodies before it is known which network they are for."""
        self.batchers_by_path: dict[str, Batcher] = {}
        """Path of a request -> the batcher that it will wait for, where the path tells."""
        self._batchers: list[Batcher] = []
        self._private_words: dict[str, str] = {}
        """Paths of this machine -> what messages say in their place."""

    # Life -----------------------------------------------------------------------------------------

    def load(
        self,
        weights: Mapping[str, str],
        index: str = "",
        *,
        image_root: str = "",
        load_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Loads weights by name, and the index. Raises ValueError where that is not possible."""
        check_options(weights, index, load_options or {})
        try:
            for name, path in weights.items():
                self.add(name, load(path, **choose_options(path, load_options)), path)
            if index:
                self.open_index(index, image_root=image_root, load_options=load_options)
        except BaseException:
            self.state = "failed"
            raise
        self.start()

    def start(self) -> None:
        """Takes requests from now on."""
        if self.state == "loading":
            self.state = "ready"

    def add(self, name: str, predictor: Predictor, path: str = "") -> Model:
        """Serves a network under a name. Raises ValueError for a name that cannot be one."""
        if not NAME.fullmatch(name) or name in RESERVED_NAMES:
            raise ValueError(f"{name!r} is no name of weights: give NAME=WEIGHTS, as vqa=runs/a")
        if name in self.models:
            raise ValueError(f"two weights are named {name}: give one as NAME=WEIGHTS")
        for word in (str(path), str(predictor.source or ""), str(predictor.report.source)):
            self.hide(word, f"the weights {name}")
        model = Model(name, predictor, self._make_batcher)
        self.models[name] = model
        self.batchers_by_path.setdefault(f"/v1/{model.task_name}", model.batcher)
        self.batchers_by_path[model.path] = model.batcher
        return model

    def open_index(
        self,
        uri: str,
        *,
        image_root: str = "",
        load_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens an index, and finds the network that made it among those that are served.

        Otherwise the weights that the index names are loaded, where they are there.
        """
        store = open_store(uri)
        self.hide(uri, "the index")
        self.hide(store.uri, "the index")
        self.hide(store.weights, "the weights of the index")
        model = self._find_model_of(store)
        if model is None and store.weights and is_there(store.weights):
            name = name_weights(store.weights)
            if name in self.models:
                name = f"{name}-of-index"
            model = self.add(
                name,
                load(store.weights, **choose_options(store.weights, load_options)),
                store.weights,
            )
        predictor = model.predictor if model is not None else None
        searcher = Searcher(store, predictor, image_root=image_root)
        self.hide(searcher.image_root, "the images")
        if model is not None:
            model.searcher = searcher
            self._add_index(Index(store, searcher, model.batcher, model.name))
            return
        LOGGER.warning("the weights of the index are not there: it is searched by id alone")

        def run(key: Hashable, items: list[Any]) -> Sequence[Any]:
            return run_search(searcher, key, items)

        self._add_index(Index(store, searcher, self._make_batcher(run, "index"), ""))

    def _add_index(self, index: Index) -> None:
        self.index = index
        self.batchers_by_path["/search"] = index.batcher

    def _find_model_of(self, store: Store) -> Model | None:
        """Returns the served network that made an index."""
        for model in self.models.values():
            if not model.embeds:
                continue
            try:
                check_fingerprint(store.fingerprint, model.predictor.fingerprint, store.uri)
            except ValueError:
                continue
            return model
        return None

    def drain(self) -> None:
        """Says that no more requests should come. Those that come are still answered."""
        self.state = "draining"

    def stop(self, *, wait: bool = True) -> None:
        """Computes what was accepted, and ends all threads.

        With `wait` it returns when that is done.
        """
        self.drain()
        for batcher in self._batchers:
            batcher.close(wait=wait)
        self.pool.shutdown(wait=wait, cancel_futures=True)
        self.files.stop()
        self.bodies.stop()

    def describe(self) -> list[str]:
        """Returns a line on each network and on the index: what it is, and its path."""
        lines = [
            f"{model.name}: {model.task_name} at {model.path}" for model in self.models.values()
        ]
        if self.index is not None:
            by = f"by {self.index.model}" if self.index.model else "by id alone"
            lines.append(f"index: {self.index.store.num_rows} rows at /search, {by}")
        return lines

    def _make_batcher(self, run: Callable[..., Any], name: str) -> Batcher:
        settings, metrics = self.settings, self.metrics
        sizes, seconds = metrics.batch_size.labels(name), metrics.batch_seconds.labels(name)

        def observe(size: int, duration: float) -> None:
            sizes.observe(size)
            seconds.observe(duration)

        batcher = Batcher(
            run,
            self.pool,
            max_batch=settings.max_batch,
            max_wait=settings.max_wait,
            max_queue=settings.max_queue,
            timeout=settings.timeout,
            observe=observe,
        )
        metrics.waiting.labels(name).set_function(lambda: batcher.count)
        self._batchers.append(batcher)
        return batcher

    # Messages -------------------------------------------------------------------------------------

    def hide(self, word: str, label: str) -> None:
        """Keeps a path out of all answers: they say `label` in its place."""
        if len(word) > 1 and word != label:
            self._private_words[word] = label

    def clean(self, message: str) -> str:
        """Returns a message without paths of this machine."""
        for word in sorted(self._private_words, key=len, reverse=True):
            message = message.replace(word, self._private_words[word])
        return message

    # Finding --------------------------------------------------------------------------------------

    def check_ready(self) -> None:
        """Raises Refusal 503 while the weights are loaded."""
        if self.state in ("loading", "failed"):
            raise Refusal(503, "the server is loading its weights", retry_after=2)

    def find_model(self, task: str, name: str = "") -> Model:
        """Returns the network of a task, and of a name if one is given. Raises Refusal 404."""
        self.check_ready()
        for model in self.models.values():
            if model.task_name == task and name in ("", model.name):
                return model
        offered = ", ".join(model.path for model in self.models.values())
        raise Refusal(404, f"there is no such endpoint: this server has {offered}")

    def find_embedder(self, name: str = "") -> Model:
        """Returns the network that encodes images and texts. Raises Refusal 404."""
        self.check_ready()
        embedders = [model for model in self.models.values() if model.embeds]
        for model in embedders:
            if name in ("", model.name):
                return model
        if not embedders:
            raise Refusal(404, "no weights of this server have features: serve those of retrieval")
        names = ", ".join(model.name for model in embedders)
        raise Refusal(404, f"there is no model {name[:60]!r}: give one of {names}", field="model")

    def find_index(self) -> Index:
        """Returns the index. Raises Refusal 404 without one."""
        self.check_ready()
        if self.index is None:
            raise Refusal(404, "this server has no index: start it with --index")
        return self.index

    # Answers --------------------------------------------------------------------------------------

    async def predict(
        self,
        model: Model,
        read: Callable[[], dict[str, Any]],
        *,
        attention: bool = False,
        reads_files: bool = False,
    ) -> dict[str, Any]:
        """Returns `predictions` of a request, and `attention` where it is asked for.

        Args:
            model: The network.
            read: Returns the fields of the request, in a thread of the pool.
            attention: Whether to add the attention of words over patches.
            reads_files: Whether the request may name files in folders.
        """
        record: dict[str, Any] = {}

        def prepare() -> tuple[Hashable, Any]:
            nonlocal record
            record = read_record(model.predictor.task, model.inputs, read(), self.settings.limits)
            prepared = model.prepare(record)
            if not attention:
                record = {}  # its bytes are needed no more
            return prepared

        started = time.monotonic()
        predictions = await model.batcher.submit(prepare, pool=self._choose_pool(reads_files))
        answer = {"predictions": [format_prediction(value) for value in predictions]}
        if attention:
            text = ATTENTION_TEXTS[model.task_name](record, predictions[0])
            if not text:  # a caption without words
                return answer | {"attention": {"words": [], "maps": []}}
            item = (record["image"], text)
            remaining = max(0.0, self.settings.timeout - (time.monotonic() - started))
            answer["attention"] = await model.batcher.submit(
                lambda: (("attention",), item), timeout=remaining
            )
        return answer

    async def embed(self, model: Model, modality: str, value: Any) -> tuple[np.ndarray, int]:
        """Returns the features [D] of one image or text, and its number of tokens of text.

        `value` is a text, or an image as `read_image` takes it.
        """
        num_tokens = 0

        def prepare() -> tuple[Hashable, Any]:
            nonlocal num_tokens
            if modality == "image":
                image = read_image(value, "input", self.settings.limits)
                record = model.predictor.task.record(image=image)
            else:
                record = model.predictor.task.record(text=value)
            key, example = model.prepare_features(record, modality)
            if modality == "text":
                num_tokens = int((~example["text_padding"]).sum())
            return key, example

        pool = self._choose_pool(reads_files=isinstance(value, dict))
        features = await model.batcher.submit(prepare, pool=pool)
        return features, num_tokens

    async def search(
        self,
        index: Index,
        prepare: Callable[[], tuple[Hashable, Query]],
        *,
        reads_files: bool = False,
    ) -> list[Result]:
        """Returns the results of a query; `prepare` returns the batch key and the query."""
        return await index.batcher.submit(prepare, pool=self._choose_pool(reads_files))

    def _choose_pool(self, reads_files: bool) -> ThreadPoolExecutor:
        return self.files.executor if reads_files else self.pool


def format_prediction(prediction: dict[str, Any]) -> dict[str, Any]:
    """Returns a prediction as it is served: boxes of objects are [x1, y1, x2, y2]."""
    objects = prediction.get("objects")
    if not isinstance(objects, list):
        return prediction
    served = []
    for item in objects:
        x, y, width, height = item["box"]
        served.append(item | {"box": [x, y, x + width, y + height]})
    return prediction | {"objects": served}


def check_options(weights: Mapping[str, str], index: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for options of released files where only weights that ship are served."""
    given = [name for name in OPTIONS_OF_RELEASED_FILES if options.get(name)]
    if given and not index and all(is_shipped(path) for path in weights.values()):
        raise ValueError(
            f"{', '.join(given)}: the weights that ship have their own; name the released file "
            "that these are for"
        )


def choose_options(path: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the options of `load` for weights; those that ship have names of their own."""
    dropped = OPTIONS_OF_RELEASED_FILES if is_shipped(path) else ()
    return {name: value for name, value in (options or {}).items() if name not in dropped}


def is_shipped(path: str) -> bool:
    """Returns whether a name is that of weights that ship, and not a path."""
    return not Path(path).exists() and find_shipped(path) is not None


# Names --------------------------------------------------------------------------------------------


def parse_weights(words: Sequence[str]) -> dict[str, str]:
    """Returns name -> path of weights that are given as WEIGHTS or NAME=WEIGHTS.

    Raises ValueError where there are no such weights, or two have one name.
    """
    weights: dict[str, str] = {}
    for word in words:
        name, separator, path = word.partition("=")
        is_named = bool(separator) and NAME.fullmatch(name) is not None and not Path(word).exists()
        if not is_named:
            name, path = name_weights(word), word
        find_path(path)
        if name in weights:
            raise ValueError(f"two weights are named {name}: give one as NAME=WEIGHTS")
        if not NAME.fullmatch(name) or name in RESERVED_NAMES:
            raise ValueError(f"{word}: {name!r} can be no name in a URL: give NAME={path}")
        weights[name] = path
    return weights


def name_weights(path: str) -> str:
    """Returns the name of weights: that of shipped weights, of the run, or of the file."""
    if not Path(path).exists() and find_shipped(path) is not None:
        return Path(path).as_posix().replace("/", "-")
    resolved = Path(path).resolve()
    is_part_of_run = resolved.name in ("best", "last")
    stem = resolved.parent.name if is_part_of_run else resolved.name
    stem = re.sub(r"\.(pth|pt|bin|safetensors|onnx)$", "", stem)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "weights"
