"""What a recipe cannot have where networks learn latents: anything that is made for pixels."""

from typing import TYPE_CHECKING

from cm_core.distances import Lpips

if TYPE_CHECKING:
    from flows.recipes.recipe import Recipe


def check_latents(recipe: "Recipe") -> None:
    """Raise ValueError, one line, for an augmentation, flips or a distance of pixels together with `data.latents`."""
    if recipe.data.latents is None:
        return
    for role, section in {"teacher": recipe.teacher, **recipe.students()}.items():
        if section is None or section.is_imported:
            continue
        if section.train.flip:
            raise ValueError(
                f"{role}.train.flip=true: latents of mirrored images are not mirrored latents (data.latents); set it to"
                " false"
            )
        if getattr(section.method, "augment", None):
            raise ValueError(
                f"{role}.method.augment changes pixels, and data.latents trains on latents; set it to null"
            )
        if isinstance(getattr(section.method, "distance", None), Lpips):
            raise ValueError(
                f"{role}.method.distance=lpips compares pixels, and data.latents trains on latents; set it to"
                " pseudo_huber, l2 or l1"
            )
