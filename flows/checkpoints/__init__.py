"""Training states in flight, in a folder or in a bucket."""
