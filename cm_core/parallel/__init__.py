"""Several processes for one training: rows, gradients, sharding; CUDA graphs and memory of a pass."""
