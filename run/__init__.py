"""A run's folder, checkpoints, log and processes; knows nothing of the model."""
