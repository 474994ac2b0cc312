"""Visual embeddings on the disk (`store`), what they are computed from (`inputs`), items that use them (`items`)."""
