"""The HTTP server: one endpoint per task, embeddings, search and a page, over batched networks."""
