"""Paths and URLs: which folder a relative path starts at, also in a submitted Ray job."""

from __future__ import annotations

import os

from sevenfold.storage.url_secrets import keep_secrets


def in_ray_job() -> bool:
    """Returns whether this process is the entry point of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def home() -> str:
    """Returns the folder that relative paths start at.

    This is `$SEVENFOLD_HOME` if it is set. Else it is the current folder; but in a submitted Ray
    job, whose current folder is a temporary copy, it is `~/sevenfold`.
    """
    configured = os.environ.get("SEVENFOLD_HOME")
    if configured:
        return os.path.abspath(os.path.expanduser(configured))
    return os.path.expanduser("~/sevenfold") if in_ray_job() else os.getcwd()


def is_url(path: str) -> bool:
    """Returns whether this is a URL, not a local path."""
    return "://" in path


def resolve_input(path: str) -> str:
    """Returns the absolute form of an input's path or URL; of a URL without its secrets.

    In a submitted Ray job, a relative path that exists in the job's working directory, because it
    was uploaded with the job, refers to the file there.
    """
    if is_url(path):
        return keep_secrets(path).rstrip("/")
    if in_ray_job() and os.path.exists(os.path.expanduser(path)):
        return os.path.abspath(os.path.expanduser(path))
    return resolve_output(path)


def resolve_output(path: str) -> str:
    """Returns the absolute form of an output's path or URL; of a URL without its secrets.

    Unlike `locate`, it never refers to a job's working directory, which is deleted after the job.
    """
    if is_url(path):
        return keep_secrets(path).rstrip("/")
    return os.path.normpath(os.path.join(home(), os.path.expanduser(path)))


def join(root: str, *parts: str) -> str:
    """Joins the parts of a path or URL."""
    return "/".join([root.rstrip("/"), *parts]) if is_url(root) else os.path.join(root, *parts)
