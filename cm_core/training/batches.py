"""Training batches from images or latents: all on the device if they fit, else prefetched by a thread.

The order is a pure function of (seed, epoch), a batch of (seed, step): a resumed run sees the same batches.
"""

import functools
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cm_core.guidance import WeightRange
from cm_core.methods.base import Batch
from cm_core.randomness import derive_seed, make_generator
from cm_core.tensors import to_inputs

ON_DEVICE_BYTES = 4 << 30  # CIFAR-10 needs 154 MB; beyond this the set is streamed


class Batches:
    """Batches of a data set; `at(step)` returns the one of an optimiser step."""

    def __init__(
        self,
        images: np.ndarray,  # uint8 [N, H, W, C], or latents, float32 [N, 2, C, h, w]; memory-mapped or not
        labels: np.ndarray | None,  # int64 [N], None for unconditional training
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        flip: bool = False,
        guidance_range: WeightRange | None = None,  # of weights that are drawn for each image
    ) -> None:
        if len(images) < batch_size:
            raise ValueError(f"batch_size={batch_size} needs at least as many images, the data set has {len(images)}")
        self.batch_size, self.seed, self.device, self.flip = batch_size, seed, device, flip
        self.images, self.labels, self.guidance_range = images, labels, guidance_range
        self.resident = torch.tensor(np.asarray(images), device=device) if images.nbytes <= ON_DEVICE_BYTES else None
        self._ahead: tuple[int, Future[Tensor]] | None = None
        self._thread = None if self.resident is not None else ThreadPoolExecutor(1)
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def at(self, step: int) -> Batch:
        """Return batch `step`, randomly flipped if requested, as float32 on the device: pixels reach from -1 to 1."""
        indices = self.indices(step)
        pixels = self._resident(indices) if self.resident is not None else self._streamed(step)
        latents = self.images.dtype != np.uint8
        x0 = to_inputs(pixels, make_generator(self.device, self.seed, "posterior", step) if latents else None)
        if self.flip:
            generator = make_generator(self.device, self.seed, "flip", step)
            flipped = torch.rand(len(x0), generator=generator, device=self.device) < 0.5
            x0 = torch.where(flipped[:, None, None, None], x0.flip(3), x0)
        labels = None if self.labels is None else self._moved(self.labels[indices])
        return Batch(x0, labels, self._weights(step))

    def _weights(self, step: int) -> Tensor | None:
        """Return the weights of guidance of batch `step`, uniform in their range, float32 [B]."""
        if self.guidance_range is None:
            return None
        low, high = self.guidance_range
        generator = make_generator(self.device, self.seed, "guidance", step)
        return low + (high - low) * torch.rand(self.batch_size, generator=generator, device=self.device)

    def indices(self, step: int) -> np.ndarray:
        """Return the image indices of batch `step`, [B]; each epoch visits every image once."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.images))
        orders = [self._order(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(orders)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(derive_seed(self.seed, "order", epoch)).permutation(len(self.images))

    def _resident(self, indices: np.ndarray) -> Tensor:
        assert self.resident is not None
        return self.resident[self._moved(indices)]

    def _streamed(self, step: int) -> Tensor:
        assert self._thread is not None
        ready = self._ahead[1] if self._ahead and self._ahead[0] == step else self._thread.submit(self._gather, step)
        pixels = ready.result()
        self._ahead = (step + 1, self._thread.submit(self._gather, step + 1))
        return pixels.to(self.device, non_blocking=True)

    def _gather(self, step: int) -> Tensor:
        return self._pinned(self.images[self.indices(step)])

    def _moved(self, array: np.ndarray) -> Tensor:
        """Copy to the device, from pinned memory: otherwise the host would wait for all queued device work."""
        return self._pinned(array).to(self.device, non_blocking=True)

    def _pinned(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor
