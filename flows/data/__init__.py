"""Sources of images and the prepared data set."""
