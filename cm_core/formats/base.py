"""A checkpoint read from another format, and what its readers share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from cm_core.model import Form, ModelSpec
from cm_core.networks import MLPParams


class UnreadableCheckpoint(ValueError):
    """A file that is damaged, hostile, or of another kind; the message is one line without the file's name."""


MOST_NORM_GROUPS = 32  # of a network that sets none
OUR_ROWS, NVLABS_ROWS = "rows (3, head, channel)", "rows (head, channel, 3)"  # of queries, keys and values in one layer


@dataclass(frozen=True)
class Hints:
    """Facts that a format may leave out of its files; None: taken from the file, or from the published models."""

    form: Form | None = None
    resolution: int | None = None
    channels_per_head: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model read from a file: the format's name and its licence; spec, weights and buffers under our names.

    `attention` is how queries, keys and values lie in the file.
    """

    format: str
    licence: str  # as the repository of the format states it for its models
    spec: ModelSpec
    weights: dict[str, Tensor]
    attention: str = OUR_ROWS


def build_spec(**fields: Any) -> ModelSpec:
    """Return the spec of a file. Raises UnreadableCheckpoint if this package has no such model."""
    try:
        return ModelSpec(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UnreadableCheckpoint(f"{key}={first['input']!r} is not supported: {first['msg']}") from error


def needed_norm_groups(groups: int, channels: int) -> int | None:
    """Return DhariwalUNetParams.norm_groups for norms of `groups` in a network of base width `channels`."""
    return None if groups == MOST_NORM_GROUPS and channels >= 4 * groups else groups


def choose_form(allowed: Sequence[Form], hint: Form | None, *, what: str) -> Form:
    """Return the form asked for if it is among those of a file, else the first of them."""
    if hint is None:
        return allowed[0]
    if hint not in allowed:
        raise UnreadableCheckpoint(f"{what} is of form {' or '.join(allowed)}, and form {hint} is wanted")
    return hint


def only(settings: Mapping[str, Any], **allowed: Sequence[Any]) -> None:
    """Raise UnreadableCheckpoint unless each setting has one of its allowed values."""
    for key, values in allowed.items():
        if settings[key] not in values:
            raise UnreadableCheckpoint(f"{key}={settings[key]!r} is not supported; read are {list(values)}")


def refuse_larger(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
    """Raise UnreadableCheckpoint if the network has more layers or channels than the file's tensors: building it costs.

    Numbers of a hostile configuration may be anything. Tensors that share their numbers are refused, too: each may be
    copied on its way into the network.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    if sum(tensor.nbytes for tensor in tensors.values()) > sum(storages.values()):
        raise UnreadableCheckpoint("its tensors share their numbers")
    longest = max((max(tensor.shape, default=1) for tensor in tensors.values()), default=0)
    if isinstance(spec.network, MLPParams):
        size, layers = spec.network.width, spec.network.depth
    else:
        size, layers = spec.network.channels, spec.network.num_blocks * len(spec.network.channel_mult)
    if max(size, spec.num_classes, spec.augment_dim) > longest or layers > len(tensors):
        raise UnreadableCheckpoint("its network is described as larger than its weights")


def levels_by_size(spec: ModelSpec) -> dict[str, int]:
    """Return the levels of a U-Net by the sizes of their images, "HxW", as NVlabs' code names its blocks."""
    assert not isinstance(spec.network, MLPParams)
    _, height, width = spec.image_shape
    return {f"{height >> level}x{width >> level}": level for level in range(len(spec.network.channel_mult))}


def rows_by_role(tensor: Tensor, per_head: int | None) -> Tensor:
    """Reorder rows of a layer of queries, keys and values, (head, channel, 3) -> (3, head, channel); None: one head."""
    rows = tensor.shape[0] // 3
    split = tensor.reshape(rows // (per_head or rows), per_head or rows, 3, -1)
    return split.permute(2, 0, 1, 3).reshape(tensor.shape)


def adopt(spec: ModelSpec, tensors: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Return a file's tensors under this package's names, in float32.

    Raises UnreadableCheckpoint unless names and shapes are those of the network.
    """
    refuse_larger(spec, tensors)
    try:
        with torch.device("meta"):
            own = spec.build().state_dict()
    except ValueError as error:
        raise UnreadableCheckpoint(str(error)) from error
    weights = {f"net.{rename(name)}": tensor.float() for name, tensor in tensors.items()}
    if odd := sorted(weights.keys() ^ own.keys()):
        raise UnreadableCheckpoint(f"its network differs: only one of the two has {odd[0].removeprefix('net.')}")
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            shapes = f"{tuple(weights[name].shape)} in the file, {tuple(tensor.shape)} expected"
            raise UnreadableCheckpoint(f"its network differs: {name.removeprefix('net.')} is {shapes}")
    places = [tensor.data_ptr() for tensor in weights.values()]
    if len(set(places)) < len(places):
        raise UnreadableCheckpoint("two of its tensors are the same memory")
    return weights
