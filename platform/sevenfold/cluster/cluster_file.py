"""Reads the cluster.yaml of Ray's cluster launcher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sevenfold.errors import InputError
from sevenfold.recipe.plain_yaml import read_yaml

Config = Mapping[str, Any]


def read_cluster_file(path: str) -> Config:
    """Returns the parsed cluster.yaml.

    Raises:
        InputError: The file does not exist, is not valid YAML, or describes no cluster; or a node
            type is not a mapping.
    """
    config = read_yaml(path, "a cluster.yaml", for_ray=True)
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
