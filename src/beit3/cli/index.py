"""`beit3 index`: what a store of vectors holds, and changes to it without embedding again."""

import json
import sys
from typing import Annotated, Any

from cyclopts import Parameter

Words = Annotated[tuple[str, ...], Parameter(consume_multiple=True)]


def index(
    uri: str,
    /,
    *,
    info: bool = False,
    faiss: bool = False,
    to: str = "",
    add: str = "",
    replace: str = "",
    delete: Words = (),
    delete_where: str = "",
) -> None:
    """Show or change an index: build FAISS, copy to Milvus, add, replace and delete.

    ```
    beit3 index V
    beit3 index V --faiss
    beit3 index V --to photos.db
    beit3 index V --add V2
    beit3 index V --delete-where "year < 1990"
    ```

    A folder is searched exactly without any of this. docs/search.md explains stores and filters.

    Args:
        uri: A folder of vectors, a file.db of Milvus Lite or http://host:port of a Milvus server,
            the latter two with #collection or /collection where it is not "beit3".
        info: Print what the index holds, as without any option.
        faiss: Build an approximate FAISS index in the folder, and measure its recall.
        to: Copy the folder into a new collection of Milvus, at this URI.
        add: Add the rows of this folder.
        replace: Add the rows of this folder in place of those with the same ids.
        delete: Delete the rows with these ids.
        delete_where: Delete the rows that pass this filter.
    """
    actions = {
        "--faiss": faiss,
        "--to": to,
        "--add": add,
        "--replace": replace,
        "--delete": delete,
        "--delete-where": delete_where,
    }
    chosen = [name for name, value in actions.items() if value]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)}: give one of them at a time")
    if faiss:
        build_faiss(uri)
    elif to:
        report(f"{copy(uri, to)} rows copied to {to}")
        uri = to
    elif add or replace:
        from beit3.search.copying import add_folder

        number = add_folder(uri, add or replace, replace=bool(replace))
        report(f"{number} rows added to {uri}")
    elif delete or delete_where:
        report(f"{delete_rows(uri, delete, delete_where)} rows deleted from {uri}")
    print(json.dumps(describe(uri), indent=1, ensure_ascii=False))


def report(text: str) -> None:
    """Prints a line about what was done to stderr."""
    print(text, file=sys.stderr)


def build_faiss(uri: str) -> None:
    """Builds a folder's FAISS indexes and prints their recall."""
    from beit3.search.stores.faiss import build_faiss_index
    from beit3.search.stores.uri import is_milvus_uri

    if is_milvus_uri(uri):
        raise ValueError(f"--faiss builds an index in a folder of vectors, {uri} is of Milvus")
    for modality, facts in build_faiss_index(uri).items():
        report(
            f"{modality} vectors: {facts.kind} {facts.parameters}: recall@10 against exact search "
            f"{facts.recall:.3f} for queries like the index (effort {facts.effort}), "
            f"{facts.far_recall:.3f} for others, such as texts among images (effort "
            f"{facts.far_effort}); {facts.queries} queries of each kind"
        )


def copy(uri: str, to: str) -> int:
    """Copies a folder into Milvus, and returns the number of rows."""
    from beit3.search.copying import copy_to_milvus
    from beit3.search.stores.uri import is_milvus_uri

    if is_milvus_uri(uri) or not is_milvus_uri(to):
        raise ValueError(
            f"--to copies a folder to Milvus (file.db or http://host:port), not {uri} to {to}"
        )
    return copy_to_milvus(uri, to)


def delete_rows(uri: str, ids: tuple[str, ...], where: str) -> int:
    """Deletes rows by their ids or by a filter, and returns their number."""
    from beit3.search.filters import parse_filter
    from beit3.search.stores.uri import is_milvus_uri, open_store

    store = open_store(uri, index="auto" if is_milvus_uri(uri) else "exact", read_only=False)
    chosen = list(ids) if ids else store.select_ids(parse_filter(where))
    return store.delete(chosen) if chosen else 0


def describe(uri: str) -> dict[str, Any]:
    """Returns what an index holds."""
    from beit3.search.stores.exact import ExactStore
    from beit3.search.stores.faiss import read_facts
    from beit3.search.stores.uri import is_milvus_uri, open_store

    store = open_store(uri, index="auto" if is_milvus_uri(uri) else "exact")
    content: dict[str, Any] = {
        "uri": uri,
        "rows": store.num_rows,
        "dim": store.dim,
        "modalities": store.modalities,
        "columns": store.columns,
        "weights": store.weights,
        "image_root": store.image_root,
        "fingerprint": store.fingerprint,
    }
    if isinstance(store, ExactStore):
        manifest = store.folder.manifest
        content["deleted"] = len(store.folder.deleted)
        content["dtype"] = manifest.dtype
        content["precision"] = manifest.precision
        content["generation"] = manifest.generation
        content["faiss"] = {
            modality: {
                "kind": facts.kind,
                "parameters": facts.parameters,
                "effort": facts.effort,
                "recall@10": facts.recall,
                "far_effort": facts.far_effort,
                "far_recall@10": facts.far_recall,
                "rows": sum(rows for _, rows in facts.shards),
            }
            for modality, facts in read_facts(uri).items()
        }
    return content
