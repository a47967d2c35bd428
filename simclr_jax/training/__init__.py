"""Training: state, step, objectives, loop, checkpoints and telemetry, the same for every job that trains."""
