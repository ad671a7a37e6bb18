"""Files on a local disk or behind a URL (s3://, gs://, http(s)://, ...), through fsspec.

All operations are retried if the storage fails temporarily: see `sevenfold.storage.retry`.
"""

from sevenfold.storage.checksums import (
    CHECKSUMS,
    file_digest,
    verify_checksums,
    write_checksums,
)
from sevenfold.storage.copies import SMALL_FILES, local_copy, user_temporary_folder
from sevenfold.storage.files import (
    DAMAGED_HINT,
    InputFile,
    InputListing,
    NoFilesError,
    copy,
    exists,
    find_files,
    input_files,
    json_object,
    list_input,
    listdir,
    makedirs,
    open_read,
    read_json,
    read_text,
    remove,
    remove_empty,
    size,
    to_json,
    version,
    write,
    write_json,
)
from sevenfold.storage.folders import (
    new_folder,
    temporary_folder_beside,
    upload,
)
from sevenfold.storage.listing import plain_name
from sevenfold.storage.paths import home, in_ray_job, is_url, join, resolve_input, resolve_output
from sevenfold.storage.private import require_private, user_folder
from sevenfold.storage.reader import Reader
from sevenfold.storage.url_secrets import (
    URLS_VARIABLE,
    CarriesSecrets,
    all_full_urls,
    hide_secrets,
    keep_secrets,
    save_full_urls,
    without_secrets,
)

__all__ = [
    "CHECKSUMS",
    "DAMAGED_HINT",
    "SMALL_FILES",
    "URLS_VARIABLE",
    "CarriesSecrets",
    "InputFile",
    "InputListing",
    "NoFilesError",
    "Reader",
    "all_full_urls",
    "copy",
    "exists",
    "file_digest",
    "find_files",
    "hide_secrets",
    "home",
    "in_ray_job",
    "input_files",
    "is_url",
    "join",
    "json_object",
    "keep_secrets",
    "list_input",
    "listdir",
    "local_copy",
    "makedirs",
    "new_folder",
    "open_read",
    "plain_name",
    "read_json",
    "read_text",
    "remove",
    "remove_empty",
    "require_private",
    "resolve_input",
    "resolve_output",
    "save_full_urls",
    "size",
    "temporary_folder_beside",
    "to_json",
    "upload",
    "user_folder",
    "user_temporary_folder",
    "verify_checksums",
    "version",
    "without_secrets",
    "write",
    "write_checksums",
    "write_json",
]
