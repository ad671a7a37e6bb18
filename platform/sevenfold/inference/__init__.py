"""Use of finished models: text generation, chat, embeddings and retrieval."""
