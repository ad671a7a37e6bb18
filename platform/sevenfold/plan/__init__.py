"""Planning a run without GPUs: its memory, speed and cost on given machines."""
