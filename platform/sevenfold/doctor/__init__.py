"""`sevenfold doctor`: checks of a machine, a recipe, a `cluster.yaml` and a running cluster."""
