"""The training loop and its parts: state, batches, optimisers, EMAs, checkpoints, cost."""
