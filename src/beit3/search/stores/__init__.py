"""Stores of vectors behind one interface: exact, FAISS, Milvus."""
