"""The training loop and its parts: state, batches, optimisers, averages, checkpoints, cost."""
