"""Features of images and the metrics computed from them."""
