"""Training: the one loop, its window, optimiser, checkpoints, step-0 invariants, signals, trackers. Import from the modules by name."""
