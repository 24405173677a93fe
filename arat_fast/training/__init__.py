"""Training runs: epochs, schedule, checkpoints, averages."""
