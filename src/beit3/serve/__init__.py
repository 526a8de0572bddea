"""The HTTP server: one endpoint a task, embeddings, search and a page, over batched networks."""
