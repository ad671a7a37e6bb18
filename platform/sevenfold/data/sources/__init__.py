"""Reads documents from files.

- `source_files`: which files of a source are read; `hub_datasets` for those of the hub.
- `shards`: input files and the row groups that they are split into.
- `row_groups`: splits files into row groups.
- `reading`: reads the documents of a row group; `json_lines`, `csv_rows`, `csv_cells` and
  `text_blocks` read text files, `arrow_batches` Arrow IPC.
- `documents`: checks, filters and splits these documents.
- `formats`: the row formats of fine-tuning data.
- `records`: reads files row by row, to inspect them.
- `python_corpus`: builds a corpus from the Python installation's own source code.
"""
