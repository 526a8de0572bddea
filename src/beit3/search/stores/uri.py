"""`open_store`: one text names a store of any kind."""

import re
from pathlib import Path

from beit3.search.stores.store import Store

INDEXES = ("auto", "exact", "faiss")


def open_store(uri: str, *, index: str = "auto", read_only: bool = True) -> Store:
    """Opens a store of vectors.

    Args:
        uri: A folder of vectors; `file.db` or `file.db#collection` of Milvus Lite; or
            `http://host:port` or `http://host:port/collection` of a Milvus server.
        index: "exact", "faiss", or "auto": FAISS where the folder has such an index.
        read_only: Whether writing is refused.

    Raises:
        ValueError: If there is no store at the URI, or it is damaged, or does not answer.
    """
    if index not in INDEXES:
        raise ValueError(f"index {index!r}: choose one of {', '.join(INDEXES)}")
    if is_milvus_uri(uri):
        from beit3.search.stores.milvus import MilvusStore

        if index != "auto":
            raise ValueError(f"{uri} is of Milvus, which chooses its index: leave out {index!r}")
        return MilvusStore(uri, read_only=read_only)
    from beit3.search.stores.faiss import FaissStore, has_faiss_index

    if index == "faiss" or (index == "auto" and has_faiss_index(uri)):
        return FaissStore(uri, read_only=read_only)
    from beit3.search.stores.exact import ExactStore

    return ExactStore(Path(uri), read_only=read_only)


def is_milvus_uri(uri: str) -> bool:
    """Tells whether a URI names Milvus: a server, or a file whose name ends in .db."""
    return bool(re.match(r"https?://", uri)) or uri.partition("#")[0].endswith(".db")
