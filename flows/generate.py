"""The former name of `flows.inference.generate`, which models logged before the wings import.

Such a model brings its own code, and a process without ours runs that. Where our `flows` is imported already, Python
looks for the model's imports in it; this name then leads to the present code, which draws the same images.
"""

from flows.inference.generate import draw_images, read_levels, usual_mid_sigmas

__all__ = ["draw_images", "read_levels", "usual_mid_sigmas"]
