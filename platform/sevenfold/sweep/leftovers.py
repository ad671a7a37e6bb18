"""Releases what stopped trials of a sweep still hold in the Ray cluster."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.state import list_actors, list_placement_groups
from ray.util.state.exception import RayStateApiException

from sevenfold.errors import first_line
from sevenfold.report.console import say


def release_leftovers() -> list[str] | None:
    """Releases the resources that stopped trials still hold, and prints them.

    Returns:
        A text for each resource; None if the cluster did not answer.
    """
    try:
        groups, actors = _find_leftovers()
    except RayStateApiException as e:
        say(f"could not check that stopped trials released their resources: {first_line(e)}")
        return None
    for group in groups:
        group_id = ray.PlacementGroupID(bytes.fromhex(group.placement_group_id))
        remove_placement_group(PlacementGroup(group_id))  # ends the actors in it too
    leftovers = [f"placement group {group.placement_group_id}" for group in groups]
    leftovers += [f"{actor.class_name} (process {actor.pid})" for actor in actors]
    for leftover in leftovers:
        say(f"released what a stopped trial still held: {leftover}")
    return leftovers


def _find_leftovers(wait_seconds: float = 30) -> tuple[list[Any], list[Any]]:
    """Waits for this job's placement groups and actors to end. Returns those that have not.

    Raises:
        RayStateApiException: The cluster did not answer.
    """
    context = ray.get_runtime_context()
    address, job_id = context.gcs_address, context.get_job_id()
    deadline = time.monotonic() + wait_seconds
    while True:
        groups = list_placement_groups(
            address=address,
            filters=[("creator_job_id", "=", job_id), ("state", "!=", "REMOVED")],
        )
        actors = list_actors(
            address=address, filters=[("job_id", "=", job_id), ("state", "!=", "DEAD")], detail=True
        )
        actors = [a for a in actors if not a.is_detached]  # detached ones are Ray's own
        if not (groups or actors) or time.monotonic() > deadline:
            return groups, actors
        time.sleep(0.5)
