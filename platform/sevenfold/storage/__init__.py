"""Files on a local disk or behind a URL (s3://, gs://, http(s)://, ...), through fsspec.

All operations are retried if the storage fails temporarily: see `sevenfold.storage.retry`.
"""

from sevenfold.storage.files import (
    copy,
    exists,
    files,
    find,
    listdir,
    makedirs,
    open_read,
    read_json,
    read_text,
    remove,
    remove_empty,
    size,
    write,
)
from sevenfold.storage.folders import local, new_folder, temporary_folder_beside, upload
from sevenfold.storage.paths import home, in_ray_job, is_url, join, locate, place
from sevenfold.storage.reader import Reader

__all__ = [
    "Reader",
    "copy",
    "exists",
    "files",
    "find",
    "home",
    "in_ray_job",
    "is_url",
    "join",
    "listdir",
    "local",
    "locate",
    "makedirs",
    "new_folder",
    "open_read",
    "place",
    "read_json",
    "read_text",
    "remove",
    "remove_empty",
    "size",
    "temporary_folder_beside",
    "upload",
    "write",
]
