"""What AWS's machines have. From the pages of the instance types, 2026-11; families that are not here are not checked."""

import re

# instance type -> (GPUs, vCPUs)
GPUS = {
    "g4dn.xlarge": (1, 4), "g4dn.2xlarge": (1, 8), "g4dn.4xlarge": (1, 16), "g4dn.8xlarge": (1, 32), "g4dn.12xlarge": (4, 48),
    "g4dn.16xlarge": (1, 64), "g4dn.metal": (8, 96),
    "g5.xlarge": (1, 4), "g5.2xlarge": (1, 8), "g5.4xlarge": (1, 16), "g5.8xlarge": (1, 32), "g5.12xlarge": (4, 48),
    "g5.16xlarge": (1, 64), "g5.24xlarge": (4, 96), "g5.48xlarge": (8, 192),
    "g6.xlarge": (1, 4), "g6.2xlarge": (1, 8), "g6.4xlarge": (1, 16), "g6.8xlarge": (1, 32), "g6.12xlarge": (4, 48),
    "g6.16xlarge": (1, 64), "g6.24xlarge": (4, 96), "g6.48xlarge": (8, 192),
    "g6e.xlarge": (1, 4), "g6e.2xlarge": (1, 8), "g6e.4xlarge": (1, 16), "g6e.8xlarge": (1, 32), "g6e.12xlarge": (4, 48),
    "g6e.16xlarge": (1, 64), "g6e.24xlarge": (4, 96), "g6e.48xlarge": (8, 192),
    "p3.2xlarge": (1, 8), "p3.8xlarge": (4, 32), "p3.16xlarge": (8, 64), "p3dn.24xlarge": (8, 96),
    "p4d.24xlarge": (8, 96), "p4de.24xlarge": (8, 96),
    "p5.4xlarge": (1, 16), "p5.48xlarge": (8, 192), "p5e.48xlarge": (8, 192), "p5en.48xlarge": (8, 192),
    "p6-b200.48xlarge": (8, 192),
}  # fmt: skip
_SIZES = {"large": 2, "xlarge": 4}


def of(kind: str) -> tuple[int, int] | None:
    """(GPUs, vCPUs) of an instance type; None where it is not known here."""
    if kind in GPUS:
        return GPUS[kind]
    if not (found := re.fullmatch(r"[cmr]\d[a-z]*\.(?:(\d+)x|x)?large", kind)):  # of general purpose: four cores an xlarge
        return None
    return 0, 4 * int(found[1]) if found[1] else _SIZES[kind.partition(".")[2]]
