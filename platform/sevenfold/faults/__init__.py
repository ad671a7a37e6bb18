"""`sevenfold drill`: injects faults into real runs and compares the results with a baseline run."""
