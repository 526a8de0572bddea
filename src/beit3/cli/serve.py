"""`beit3 serve`: weights and an index over HTTP, with a page."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from beit3.cli.options import Amount, Count, PrecisionName, Size


def serve(
    *weights: str,
    index: str = "",
    host: str = "127.0.0.1",
    port: Size = 8000,
    token_file: str = "",
    folder: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    image_root: str = "",
    precision: PrecisionName = "float32",
    device: str = "cpu",
    packed: bool = False,
    text_model: str | None = None,
    answers: str | None = None,
    classes: str | None = None,
    max_batch: Count = 32,
    max_wait: Amount = 5,
    max_queue: Count = 256,
    max_bytes: Count = 33_554_432,
    max_pixels: Count = 50_000_000,
    max_text: Count = 4_000,
    max_connections: Count = 512,
    timeout: Amount = 30,
    drain: Amount = 1,
) -> None:
    """Serve weights over HTTP: one endpoint per task, embeddings, search, and a page.

    ```
    beit3 serve
    beit3 serve runs/vqa-demo captions=runs/captioning-demo --port 8080
    beit3 serve runs/retrieval-demo --index photos-index --host 0.0.0.0 --token-file token.txt
    ```

    Only this machine is served unless --host says otherwise. SIGTERM and Ctrl-C end the server
    after all accepted requests are answered (docs/serve.md).

    Args:
        weights: Weights directories, runs, released files or names of weights that ship, each as
            WEIGHTS or NAME=WEIGHTS; by default all that ship, beside an index too.
            text_model, answers and classes are not for those that ship.
        index: A folder of vectors or another index, for searches. The weights that made it are
            served as well.
        host: Address to listen at.
        port: Port to listen at; 0 takes a free one.
        token_file: A file with the token that clients must send.
        folder: Directories whose images requests may name, as {"name": "folder/file.jpg"}.
        image_root: Directory of the index's images, by default the one that it names.
        precision: Number format of the networks.
        device: Where they run, such as cuda.
        packed: Lay the weights out for batches, a third faster on small batches on a CPU.
        text_model: The SentencePiece file of released weights.
        answers: The answer list of a released VQA checkpoint.
        classes: Class names for imagenet, one per line.
        max_batch: Most requests that are computed together.
        max_wait: Milliseconds that a request waits at most for others that are on their way.
        max_queue: Most requests that wait for one network; more are refused with status 503.
        max_bytes: Most bytes of a request.
        max_pixels: Most pixels of an image.
        max_text: Most characters of a text. One of more tokens than the weights read is refused
            as well.
        max_connections: Most open connections.
        timeout: Seconds after which a request is given up.
        drain: Seconds that requests are still taken after SIGTERM.
    """
    from beit3.serve.server import ServerSettings, read_token, serve
    from beit3.serve.service import Settings, parse_weights
    from beit3.serve.uploads import Limits, name_folders
    from beit3.weights.names import list_shipped

    words = list(weights)
    if not words:
        words = list_shipped()
        if not words and not index:
            raise ValueError("no weights to serve: give a run, a weights directory or a file")
    limits = Limits(
        max_bytes=max_bytes,
        max_pixels=max_pixels,
        max_text=max_text,
        folders=name_folders(map(Path, folder)),
    )
    settings = ServerSettings(
        host=host,
        port=port,
        token=read_token(token_file) if token_file else "",
        drain=drain,
        max_connections=max_connections,
        service=Settings(
            max_batch=max_batch,
            max_wait=max_wait / 1000,
            max_queue=max_queue,
            timeout=timeout,
            limits=limits,
        ),
    )
    load_options = {
        "precision": precision,
        "device": device,
        "packed": packed,
        "text_model": text_model,
        "answers": answers,
        "classes": classes,
    }
    serve(parse_weights(words), index, settings, image_root=image_root, load_options=load_options)
