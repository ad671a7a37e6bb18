"""The secrets in URLs: user information, query and fragment.

A URL such as https://user:password@host/data.jsonl?signature=... gives access to a file. All of
sevenfold knows it as https://host/data.jsonl: recipes, manifests, messages and hashes have no more
than that. The whole URL is known to `filesystem` alone, which opens files. It comes from, in this
order:

1. the command or recipe that was read in this process;
2. the objects with paths that a driver sends to its workers (`CarriesSecrets`);
3. $SEVENFOLD_URLS, URLs separated by whitespace;
4. ~/.sevenfold/urls, to which a run that starts adds its URLs (mode 600, one URL per line).
"""

from __future__ import annotations

import functools
import logging
import os
import re
import secrets
from typing import Any

import filelock

# The environment variable with URLs.
URLS_VARIABLE = "SEVENFOLD_URLS"
# Schemes in which the part before "@" names a container or a repository, unless it has a password.
_CONTAINERS = frozenset({"abfs", "abfss", "wasb", "wasbs"})
_REPOSITORIES = frozenset({"github", "git"})
# The lengths are limited so that the time for a text is linear in its length.
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{0,30}"
# What comes before the last "@" of the host's part. Passwords may contain the characters that end
# that part ("/", "?", "#") although they should be encoded there; but a port is no password.
_USER = r"(?:[^\s/]*@|[^\s/@:]*:(?!\d+[/?#]|//|:)[^\s@]{0,2000}@(?:[^\s/@]*@)*)"
_LOGIN = re.compile(rf"({_SCHEME})://({_USER})")
# In object stores "?" is a wildcard and "#" a character of a name.
_TAIL = re.compile(r"[?#][^?#/=]*=.*", re.DOTALL)
_HTTP_TAIL = re.compile(r"[?#].*", re.DOTALL)
_IN_TEXT = re.compile(rf"""{_SCHEME}://[^\s"'<>`]+""")
_PARTS = re.compile(rf"({_SCHEME}://)({_USER})?([^?#]*)(.*)", re.DOTALL)

_full_urls: dict[str, str] = {}  # by their form without secrets


def without_secrets(url: str) -> str:
    """Returns a URL without its secrets; a local path as it is."""
    if "://" not in url:
        return url

    def without_login(match: re.Match[str]) -> str:
        scheme, user = match[1].lower(), match[2]
        is_name = scheme in _REPOSITORIES or (scheme in _CONTAINERS and ":" not in user)
        return match[0] if is_name else f"{match[1]}://"

    url = _LOGIN.sub(without_login, url)
    is_http = re.search(r"https?://", url, re.IGNORECASE)
    begin = url.rindex("://")
    tail = (_HTTP_TAIL if is_http else _TAIL).search(url, begin)
    return url[: tail.start()] if tail else url


def hide_secrets(text: str) -> str:
    """Returns a text, such as a library's message, without the secrets of the URLs in it."""
    if "://" not in text:
        return text

    def hidden(match: re.Match[str]) -> str:
        url = match[0].rstrip("])},.:;")
        return without_secrets(url) + match[0][len(url) :]

    return _IN_TEXT.sub(hidden, text)


def keep_secrets(path: str, stored: bool = False) -> str:
    """Returns a path or URL without secrets; this process can open the URL nevertheless.

    Args:
        path: The path or URL.
        stored: Whether it was read from a file of an earlier version, which kept the secrets. A
            URL that the user has just given is newer.
    """
    short = without_secrets(path)
    if short != path:
        if stored:
            _full_urls.setdefault(_key(short), path)
        else:
            _full_urls[_key(short)] = path
    return short


def full_url(path: str) -> str:
    """Returns the URL with its secrets, if they are known; a local path as it is.

    The secrets of a folder are also those of the files in it.
    """
    if "://" not in path:
        return path
    found = _known_url(path, _full_urls)
    return found or _known_url(path, _saved_urls(os.environ.get(URLS_VARIABLE, ""))) or path


def _key(url: str) -> str:
    """Returns the key of a URL without secrets: of a folder, it does not end with "/"."""
    return url.rstrip("/")


def _known_url(path: str, known: dict[str, str]) -> str | None:
    if _key(path) in known:
        return known[_key(path)]
    folders = [short for short in known if path.startswith(f"{short}/")]
    if not folders:
        return None
    folder = max(folders, key=len)
    parts = _PARTS.fullmatch(known[folder])
    if parts is None or "::" in path:
        return None
    scheme, user, _, tail = parts.groups()
    return f"{scheme}{user or ''}{path.partition('://')[2]}{tail}"


def all_full_urls() -> dict[str, str]:
    """Returns the URLs with secrets that this process has read, by their form without them."""
    return dict(_full_urls)


def save_full_urls() -> None:
    """Adds the URLs with secrets that this process has read to ~/.sevenfold/urls.

    Commands about a run, such as `evaluate`, thus find them without being given them again.
    """
    if _full_urls.items() <= _read_file().items():
        return
    path = _file()
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with filelock.FileLock(f"{path}.lock"):
            urls = {**_read_file(), **_full_urls}.values()
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8") as f:
                f.writelines(f"{url}\n" for url in urls)
            os.replace(temporary, path)
    except OSError as e:
        logging.getLogger(__name__).warning(
            "%s: the URLs with secrets could not be saved (%s): commands about this run will need "
            "them in $%s",
            path,
            e.strerror,
            URLS_VARIABLE,
        )
    _saved_urls.cache_clear()


def _file() -> str:
    return os.path.expanduser("~/.sevenfold/urls")


@functools.lru_cache(maxsize=1)
def _saved_urls(variable: str) -> dict[str, str]:
    """Returns the URLs in $SEVENFOLD_URLS, whose value is given, and in ~/.sevenfold/urls."""
    return _read_file() | {_key(without_secrets(url)): url for url in variable.split()}


def _read_file() -> dict[str, str]:
    try:
        with open(_file(), encoding="utf-8") as f:
            return {_key(without_secrets(url)): url for url in f.read().split()}
    except (OSError, UnicodeDecodeError):  # there is none, or it belongs to somebody else
        return {}


class CarriesSecrets:
    """A class with paths: where its objects are unpickled, the URLs in them can be opened too."""

    def __getstate__(self) -> Any:
        """Returns the object's state and the URLs with secrets of this process."""
        return all_full_urls(), super().__getstate__()

    def __setstate__(self, state: Any) -> None:
        """Restores what `__getstate__` returned."""
        urls, own = state
        _full_urls.update(urls)
        restore = getattr(super(), "__setstate__", None)
        if restore is None:
            self.__dict__.update(own)
        else:
            restore(own)
