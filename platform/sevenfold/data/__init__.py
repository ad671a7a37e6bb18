"""Turns files of documents into packed rows of token ids.

The order of the rows depends only on the recipe and the seed. The modules, in the order in which
data passes through them:

- `sources`: reads documents from files; filters, train/held-out split, fine-tuning formats.
- `manifest`: the list of all files of all sources, each split into row groups.
- `order`: which row groups form which chunk, and which chunks belong to which lane.
- `tokenizer`: trains, loads and saves tokenizers.
- `encode`: turns documents of text into token ids.
- `example_encoder`, `conversations`, `examples`: turn fine-tuning data into token ids.
- `token_cache`: token ids that were computed beforehand.
- `pack`, `rows`: pack the documents of a chunk into rows of equal length.
- `stream`, `ray_chunks`: build the chunks, in the reading process or in Ray Data tasks.
- `reader`: serves the rows of each training step, and keeps the position for checkpoints.
- `ledger`: records which rows each step read, and reproduces them.
"""
