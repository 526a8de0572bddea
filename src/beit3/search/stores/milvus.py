"""Vectors in Milvus: a file of Milvus Lite, a server or a cluster by the same calls.

One collection holds one index. Facts that a folder keeps in its manifest stand in the collection's
properties. Each batch of a write is seen whole; a write of several batches is not one step, unlike
in a folder.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from beit3.search.filters import Filter
from beit3.search.manifest import Manifest
from beit3.search.metadata import ID, describe_type, normalize_metadata
from beit3.search.stores.store import (
    Hits,
    QueryError,
    check_search,
    check_writable,
    make_unknown_id_error,
)

DEFAULT_COLLECTION = "beit3"
FACTS = "beit3.index"
"""Property of a collection with the facts of the index as JSON."""

CONNECT_SECONDS = 5
BATCH_ROWS = 1000
QUERY_ROWS = 256
MAX_HITS = 16384
"""Milvus's limit for k + offset."""

MAX_TEXT_BYTES = 65535
COLUMN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")


class MilvusStore:
    """One collection of Milvus, made by `create_collection`."""

    max_hits = MAX_HITS

    def __init__(self, uri: str, *, read_only: bool = True, unfinished: bool = False):
        self.uri = uri
        self.read_only = read_only
        self.address, self.collection = split_uri(uri)
        if is_file(self.address) and not Path(self.address).exists():
            raise ValueError(f"{self.address} does not exist: make it with `beit3 index V --to`")
        self.client = connect(self.address)
        try:
            self._open_collection()
            if not (self.facts.get("copied", True) or unfinished):
                raise ValueError(
                    f"{uri} is a copy that was interrupted: repeat `beit3 index V --to`"
                )
        except ValueError:
            self.close()
            raise

    def _open_collection(self) -> None:
        """Makes the collection ready for searches, and reads what is stored about it."""
        with explain_errors(self.uri):
            if not self.client.has_collection(self.collection):
                names = ", ".join(self.client.list_collections()) or "none"
                raise ValueError(
                    f"{self.uri} has no collection {self.collection!r}; it has {names}"
                )
            self.client.load_collection(self.collection)
        self._read_facts()

    def _read_facts(self) -> None:
        """Reads what the collection's description and properties say."""
        with explain_errors(self.uri):
            description = self.client.describe_collection(self.collection)
        facts = json.loads(description.get("properties", {}).get(FACTS, "{}"))
        if not facts:
            raise ValueError(f"{self.uri} is no index of beit3: make one with `beit3 index V --to`")
        self.facts = facts
        self.dim: int = facts["dim"]
        self.columns: dict[str, str] = facts["columns"]
        self.modalities: tuple[str, ...] = tuple(facts["modalities"])
        self.fingerprint: dict[str, str] = facts["fingerprint"]
        self.weights: str = facts["weights"]
        self.image_root: str = facts["image_root"]

    def refresh(self) -> None:
        """Does nothing: every search sees the newest rows."""

    def close(self) -> None:
        """Ends the connection; a file of Milvus Lite can then be opened by another process."""
        self.client.close()

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        with explain_errors(self.uri):
            counted = self.client.query(self.collection, filter="", output_fields=["count(*)"])
        return int(counted[0]["count(*)"])

    # Reading ----------------------------------------------------------------------------------

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        where: Filter | None = None,
        offset: int = 0,
        modality: str = "image",
    ) -> Hits:
        """Finds the best rows, see `Store`."""
        where = check_search(self, queries, k, offset, where, modality)
        if k + offset > MAX_HITS:
            raise QueryError(f"k {k} and offset {offset}: Milvus returns at most {MAX_HITS} hits")
        expression = where.to_milvus(self.columns) if where is not None else ""
        ids: list[list[str]] = []
        scores: list[np.ndarray] = []
        for start in range(0, len(queries), QUERY_ROWS):
            with explain_errors(self.uri):
                found = self.client.search(
                    self.collection,
                    data=list(queries[start : start + QUERY_ROWS].astype(np.float32)),
                    anns_field=get_vector_field(modality),
                    filter=expression,
                    limit=k + offset,
                    output_fields=[ID],
                )
            for hits in found:
                ranked = sorted((-float(hit["distance"]), str(hit[ID])) for hit in hits)[offset:]
                ids.append([name for _, name in ranked])
                scores.append(np.array([-score for score, _ in ranked], dtype=np.float32))
        return Hits(ids, scores)

    def select_ids(self, where: Filter) -> list[str]:
        """Returns the ids of the rows that pass a filter, sorted."""
        where.check(self.columns)
        ids: list[str] = []
        with explain_errors(self.uri):
            iterator = self.client.query_iterator(
                self.collection,
                filter=where.to_milvus(self.columns),
                output_fields=[ID],
                batch_size=BATCH_ROWS,
            )
            while rows := iterator.next():
                ids.extend(row[ID] for row in rows)
            iterator.close()
        return sorted(ids)

    def fetch(
        self, ids: Sequence[str], columns: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Returns metadata of rows, see `Store`."""
        names = list(self.columns) if columns is None else list(columns)
        rows = self._get_rows(ids, names)
        return [{name: row.get(name) for name in names} for row in rows]

    def get_vectors(self, ids: Sequence[str], modality: str = "image") -> np.ndarray:
        """Returns vectors, see `Store`."""
        field = get_vector_field(modality)
        rows = self._get_rows(ids, [field])
        return np.array([row[field] for row in rows], dtype=np.float32).reshape(-1, self.dim)

    def find_ids(self, ids: Sequence[str]) -> set[str]:
        """Returns those ids that are in the collection."""
        return set(self._query_rows(ids, [ID]))

    def _get_rows(self, ids: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
        """Returns rows in the order of `ids`; raises ValueError for unknown ids."""
        rows = self._query_rows(ids, names)
        unknown = [item for item in ids if item not in rows]
        if unknown:
            raise make_unknown_id_error(self.uri, unknown)
        return [rows[item] for item in ids]

    def _query_rows(self, ids: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Returns id -> row for the ids that are there."""
        rows: dict[str, dict[str, Any]] = {}
        distinct = list(dict.fromkeys(ids))
        for start in range(0, len(distinct), BATCH_ROWS):
            with explain_errors(self.uri):
                found = self.client.get(
                    self.collection,
                    ids=distinct[start : start + BATCH_ROWS],
                    output_fields=list(dict.fromkeys([ID, *names])),
                )
            rows.update((row[ID], row) for row in found)
        return rows

    # Writing ----------------------------------------------------------------------------------

    def add(self, vectors: Mapping[str, np.ndarray], metadata: pa.Table) -> None:
        """Adds rows, see `Store`."""
        check_writable(self.uri, self.read_only)
        rows = self._make_rows(vectors, metadata)
        present = self.find_ids([row[ID] for row in rows])
        if present:
            raise ValueError(
                f"{self.uri} has a row with id {min(present)!r} ({len(present)} such ids): use "
                "`beit3 index --replace` or the store's `replace`"
            )
        self._write(self.client.insert, rows)

    def replace(self, vectors: Mapping[str, np.ndarray], metadata: pa.Table) -> None:
        """Replaces rows, see `Store`."""
        check_writable(self.uri, self.read_only)
        self._write(self.client.upsert, self._make_rows(vectors, metadata))

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes rows, see `Store`."""
        check_writable(self.uri, self.read_only)
        distinct = list(dict.fromkeys(ids))
        self._get_rows(distinct, [ID])
        for start in range(0, len(distinct), BATCH_ROWS):
            with explain_errors(self.uri):
                self.client.delete(self.collection, ids=distinct[start : start + BATCH_ROWS])
        return len(distinct)

    def set_facts(self, **changes: Any) -> None:
        """Changes facts of the index."""
        facts = {**self.facts, **changes}
        with explain_errors(self.uri):
            self.client.alter_collection_properties(self.collection, {FACTS: json.dumps(facts)})
        self.facts = facts

    def _write(self, write: Any, rows: list[dict[str, Any]]) -> None:
        """Inserts or upserts rows in batches."""
        for start in range(0, len(rows), BATCH_ROWS):
            with explain_errors(self.uri):
                write(self.collection, rows[start : start + BATCH_ROWS])

    def _make_rows(
        self, vectors: Mapping[str, np.ndarray], metadata: pa.Table
    ) -> list[dict[str, Any]]:
        """Returns rows as Milvus takes them; raises ValueError when they do not fit."""
        metadata = normalize_metadata(metadata)
        if set(vectors) != set(self.modalities):
            raise ValueError(
                f"{self.uri} holds {' and '.join(self.modalities)} vectors, "
                f"{' and '.join(sorted(vectors)) or 'none'} are given: give the same ones"
            )
        for modality, rows in vectors.items():
            if rows.shape != (metadata.num_rows, self.dim):
                raise ValueError(
                    f"{self.uri}: {modality} vectors of shape {list(rows.shape)}, they should be "
                    f"{[metadata.num_rows, self.dim]}"
                )
        for field in metadata.schema:
            self._check_column(field, metadata.column(field.name))
        empty = dict.fromkeys(self.columns)
        made = [{**empty, **row} for row in metadata.to_pylist()]
        for modality, array in vectors.items():
            name = get_vector_field(modality)
            for row, vector in zip(made, np.asarray(array, dtype=np.float32), strict=True):
                row[name] = vector
        return made

    def _check_column(self, field: pa.Field, column: pa.ChunkedArray) -> None:
        """Raises ValueError when a column is not in the collection or does not fit."""
        kind = self.columns.get(field.name)
        given = str(field.type)
        if kind is None:
            raise ValueError(
                f"{self.uri} has no column {field.name!r}, and its columns are fixed: copy the "
                "folder into a new collection"
            )
        if given not in (kind, "null") and (given, kind) != ("int64", "double"):
            raise ValueError(
                f"{self.uri}: column {field.name!r} holds {describe_type(field.type)}, it should "
                f"hold {kind}"
            )
        if given == "string":
            check_text_lengths(self.uri, field.name, column)


def split_uri(uri: str) -> tuple[str, str]:
    """Splits a URI into the address of the server, or the file, and the collection."""
    if is_file(uri):
        address, _, collection = uri.partition("#")
    else:
        match = re.fullmatch(r"(https?://[^/]+)/?([^/]*)/?", uri)
        if not match:
            raise ValueError(f"{uri} should be http://host:port or http://host:port/collection")
        address, collection = match[1], match[2]
    collection = collection or DEFAULT_COLLECTION
    if not COLUMN_NAME.fullmatch(collection):
        raise ValueError(f"{uri}: a collection's name has letters, digits and _ only")
    return address, collection


def is_file(address: str) -> bool:
    """Tells whether an address is a file of Milvus Lite."""
    return not re.match(r"https?://", address)


def get_vector_field(modality: str) -> str:
    """Returns the name of the field that holds a modality's vectors."""
    return f"{modality}_vector"


def connect(address: str) -> Any:
    """Opens a file of Milvus Lite, or connects to a server (with the token in `MILVUS_TOKEN`)."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from pymilvus import MilvusClient
    except ImportError:
        raise ValueError(f"{address} needs pymilvus: pip install 'beit3[milvus]'") from None
    for name in ("pymilvus", "milvus_lite"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if is_file(address):
        Path(address).absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        return MilvusClient(
            address, token=os.environ.get("MILVUS_TOKEN", ""), timeout=CONNECT_SECONDS
        )
    except Exception as error:  # pymilvus raises several kinds, of which some are its own
        remedy = "is it open in another process?" if is_file(address) else "does the server run?"
        raise ValueError(f"{address} does not answer ({summarize(error)}): {remedy}") from None


@contextmanager
def explain_errors(uri: str) -> Iterator[None]:
    """Turns errors of Milvus into one line that names the URI."""
    from grpc import RpcError
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except (MilvusException, RpcError) as error:
        raise ValueError(f"{uri}: Milvus reports: {summarize(error)}") from None


def summarize(error: Exception) -> str:
    """Returns the first line of an error."""
    text = str(getattr(error, "message", "") or error)
    return text.strip().split("\n")[0][:200] or type(error).__name__


def check_text_lengths(uri: str, name: str, column: pa.ChunkedArray) -> None:
    """Raises ValueError when a text is longer than Milvus stores."""
    import pyarrow.compute as pc

    longest = pc.max(pc.binary_length(column)).as_py() or 0
    if longest > MAX_TEXT_BYTES:
        raise ValueError(
            f"{uri}: column {name!r} has a text of {longest} bytes, Milvus stores {MAX_TEXT_BYTES}"
        )


# Making a collection --------------------------------------------------------------------------


def create_collection(
    uri: str, manifest: Manifest, columns: Mapping[str, str], **facts: Any
) -> MilvusStore:
    """Makes an empty collection for vectors and columns like a folder's, open for writing.

    Args:
        uri: As `open_store` takes it.
        manifest: What the vectors are.
        columns: Name -> type of the metadata columns.
        facts: What is stored besides.
    """
    from pymilvus import DataType

    address, collection = split_uri(uri)
    kinds = {
        "string": DataType.VARCHAR,
        "null": DataType.VARCHAR,
        "int64": DataType.INT64,
        "double": DataType.DOUBLE,
        "bool": DataType.BOOL,
    }
    fields = [get_vector_field(modality) for modality in manifest.modalities]
    for name in columns:
        if not COLUMN_NAME.fullmatch(name) or name in fields:
            raise ValueError(f"{uri}: Milvus takes no column {name!r}: rename it (letters, _)")
    with closing(connect(address)) as client, explain_errors(uri):
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        for name, kind in columns.items():
            length = {"max_length": MAX_TEXT_BYTES} if kinds[kind] == DataType.VARCHAR else {}
            role = {"is_primary": True} if name == ID else {"nullable": True}
            schema.add_field(name, kinds[kind], **role, **length)
        indexes = client.prepare_index_params()
        for field in fields:
            schema.add_field(field, DataType.FLOAT_VECTOR, dim=manifest.dim)
            index_type = "FLAT" if is_file(address) else "AUTOINDEX"
            indexes.add_index(field, index_type=index_type, metric_type="IP")
        content = {
            "dim": manifest.dim,
            "columns": dict(columns),
            "modalities": manifest.modalities,
            "fingerprint": manifest.fingerprint,
            "weights": manifest.weights,
            "precision": manifest.precision,
            "image_root": manifest.image_root,
            **facts,
        }
        client.create_collection(
            collection,
            schema=schema,
            index_params=indexes,
            consistency_level="Strong",
            properties={FACTS: json.dumps(content)},
        )
        return MilvusStore(uri, read_only=False, unfinished=True)
