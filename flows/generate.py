"""Alias of `flows.inference.generate` for models logged before that module moved.

Such a model carries its own code, which a process without ours runs. If our `flows` is already imported, Python
resolves the model's imports in it; this alias then leads to the current code, which draws the same images.
"""

from flows.inference.generate import draw_images, read_levels, usual_mid_sigmas

__all__ = ["draw_images", "read_levels", "usual_mid_sigmas"]
