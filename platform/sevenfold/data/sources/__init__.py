"""Reads documents from files.

- `shards`: input files and the row groups that they are split into.
- `row_groups`: splits files into row groups.
- `reading`: reads the documents of a row group; `json_lines` and `text_blocks` read text files.
- `documents`: checks, filters and splits these documents.
- `formats`: the row formats of fine-tuning data.
- `records`: reads files row by row, to inspect them.
- `python_corpus`: builds a corpus from the Python installation's own source code.
"""
