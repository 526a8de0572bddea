"""Copies a folder of vectors into Milvus, or its rows into another store."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa

from beit3.progress import show_progress
from beit3.search.folder import Batch, VectorFolder, change_rows, open_folder
from beit3.search.manifest import check_fingerprint
from beit3.search.stores.milvus import (
    BATCH_ROWS,
    MilvusStore,
    connect,
    create_collection,
    explain_errors,
    split_uri,
)
from beit3.search.stores.store import Store
from beit3.search.stores.uri import is_milvus_uri, open_store

IMAGE_PATH = "image_path"
SHARD_ROWS = 65_536


def copy_to_milvus(path: str, uri: str) -> int:
    """Copies the rows of a folder into a new collection, and returns their number.

    A copy that was interrupted goes on with the same call. Raises ValueError when the collection is
    complete already, or was begun from another state of the folder.
    """
    folder = open_folder(path)
    rows = np.flatnonzero(folder.alive)
    with closing(_open_collection(folder, uri)) as store:
        with show_progress("copied") as advance:
            for start in range(0, len(rows), BATCH_ROWS):
                _copy_rows(folder, store, rows[start : start + BATCH_ROWS])
                advance(min(start + BATCH_ROWS, len(rows)), len(rows))
        store.set_facts(copied=True)
    return len(rows)


def _open_collection(folder: VectorFolder, uri: str) -> MilvusStore:
    """Makes the collection, or opens the one that an interrupted copy has left."""
    address, collection = split_uri(uri)
    with closing(connect(address)) as client, explain_errors(uri):
        present = client.has_collection(collection)
    manifest = folder.manifest
    if not present:
        columns = {field.name: str(field.type) for field in folder.schema}
        return create_collection(
            uri, manifest, columns, copied=False, generation=manifest.generation
        )
    store = MilvusStore(uri, read_only=False, unfinished=True)
    try:
        _check_copy(store, folder)
    except ValueError:
        store.close()
        raise
    return store


def _check_copy(store: MilvusStore, folder: VectorFolder) -> None:
    """Raises ValueError unless a collection is an interrupted copy of a folder as it is now."""
    if store.facts.get("copied", True):
        raise ValueError(f"{store.uri} has that collection already: name another one, or use --add")
    check_fingerprint(
        store.fingerprint, folder.manifest.fingerprint, store.uri, weights=store.weights
    )
    if store.facts.get("generation") != folder.manifest.generation:
        raise ValueError(
            f"{folder.path} has changed since its copy to {store.uri} was begun: name another "
            "collection"
        )


def _copy_rows(folder: VectorFolder, store: MilvusStore, rows: np.ndarray) -> None:
    """Copies those of some rows that the collection has not yet."""
    ids = folder.read_rows(rows, ["id"]).column("id").to_pylist()
    present = store.find_ids(ids)
    missing = rows[[name not in present for name in ids]]
    if len(missing) == 0:
        return
    vectors = {name: folder.gather_vectors(missing, name) for name in store.modalities}
    metadata: pa.Table = folder.read_rows(missing)
    store.add(vectors, metadata)


def add_folder(uri: str, path: str, *, replace: bool = False) -> int:
    """Adds the rows of a folder to a store, and returns their number.

    Paths of images become relative to the store's own root. In a folder, all rows are seen at
    once; in Milvus batch by batch.

    Args:
        uri: The store, as `open_store` takes it.
        path: The folder whose rows are added; made with the same weights and preprocessing.
        replace: Whether rows of the same ids are replaced; otherwise they raise ValueError.
    """
    source = open_folder(path)
    store = open_store(uri, index="auto" if is_milvus_uri(uri) else "exact", read_only=False)
    try:
        check_fingerprint(
            store.fingerprint, source.manifest.fingerprint, f"{uri} (beside {path})", weights=""
        )
        if is_milvus_uri(uri):
            for vectors, metadata in _iterate_batches(source, store, BATCH_ROWS):
                write = store.replace if replace else store.add
                write(vectors, metadata)
        else:
            change_rows(uri, _iterate_batches(source, store, SHARD_ROWS), replace=replace)
    finally:
        if isinstance(store, MilvusStore):
            store.close()
    return source.num_rows


def _iterate_batches(source: VectorFolder, store: Store, batch_rows: int) -> Iterator[Batch]:
    """Yields the rows of a folder with the modalities of a store."""
    rows = np.flatnonzero(source.alive)
    with show_progress("added") as advance:
        for start in range(0, len(rows), batch_rows):
            part = rows[start : start + batch_rows]
            vectors = {name: source.gather_vectors(part, name) for name in store.modalities}
            yield vectors, _move_paths(source, source.read_rows(part), store.image_root)
            advance(start + len(part), len(rows))


def _move_paths(source: VectorFolder, metadata: pa.Table, image_root: str) -> pa.Table:
    """Makes the paths of images relative to another root."""
    root = source.manifest.image_root
    if IMAGE_PATH not in metadata.column_names or os.path.abspath(root) == os.path.abspath(
        image_root
    ):
        return metadata
    paths = [
        None
        if path is None
        else Path(os.path.relpath(os.path.join(root, path), image_root or ".")).as_posix()
        for path in metadata.column(IMAGE_PATH).to_pylist()
    ]
    position = metadata.column_names.index(IMAGE_PATH)
    return metadata.set_column(position, IMAGE_PATH, pa.array(paths, type=pa.string()))
