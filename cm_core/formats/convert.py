"""Changes of an imported model that keep its function where they say so."""

from dataclasses import replace

from cm_core.formats.base import Checkpoint, UnreadableCheckpoint
from cm_core.networks import EDM2Params


def without_classes(found: Checkpoint) -> Checkpoint:
    """Return a conditional model without its layer of class labels: what it computes for no label, to the last bit.

    Raises UnreadableCheckpoint for EDM2, whose embedding without a label is scaled: no network without labels has that.
    """
    if isinstance(found.spec.network, EDM2Params):
        raise UnreadableCheckpoint("drop_classes: EDM2's network without labels is another one; set conditional: true")
    weights = dict(found.weights)
    weights.pop("net.embed.label.weight", None)
    bias = weights.pop("net.embed.label.bias", None)
    if bias is not None:  # added to the features before the first layer
        weights["net.embed.layer0.bias"] = weights["net.embed.layer0.bias"] + weights["net.embed.layer0.weight"] @ bias
    return replace(found, spec=found.spec.model_copy(update={"num_classes": 0}), weights=weights)
