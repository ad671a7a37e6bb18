"""What runs and sweeps report: terminal output, logs, rankings and an HTML page."""
