"""The training engine in plain PyTorch: loop, step, objectives, optimizers and generation."""
