"""Reads the cluster.yaml of Ray's cluster launcher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sevenfold.errors import InputError

Config = Mapping[str, Any]


def read_cluster_file(path: str) -> Config:
    """Returns the parsed cluster.yaml.

    Raises:
        InputError: The file does not exist, is not valid YAML, or describes no cluster; or a node
            type is not a mapping.
    """
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a cluster.yaml, found no file") from None
    except yaml.YAMLError as e:
        raise InputError(f"{path}: expected valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(config, dict) or not isinstance(config.get("available_node_types"), dict):
        raise InputError(
            f"{path}: expected a cluster.yaml with the key available_node_types, found none"
        )
    for name, node_type in config["available_node_types"].items():
        if not isinstance(node_type, dict):
            found = "nothing" if node_type is None else f"{node_type!r}"
            raise InputError(
                f"{path}: available_node_types.{name}: expected a mapping of settings, "
                f"found {found}"
            )
    return config
