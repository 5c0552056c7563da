"""The phantom as a source of pretraining images."""

import numpy as np

from ultradino_jax.data.sources import MIN_SIDE, check_channels, check_index, digest_of
from ultradino_jax.errors import UserError


class PhantomSource:
    """Rendered fetal-ultrasound phantoms, for runs without any data.

    Rendering is slow next to decoding, so a process keeps what it has rendered; a copy
    sent to a worker starts empty. Threads may render the same image twice, with the
    same result.

    Args:
      num_images: number of records.
      size: (H, W) in pixels.
      seed: phantoms of another seed are other images.
      channels: C; 3 replicates the grey image.
      settings: see `render_phantom`; None is the full variety.
    """

    def __init__(
        self,
        num_images: int,
        size: tuple[int, int] = (256, 256),
        seed: int = 0,
        channels: int = 1,
        settings: int | None = None,
    ):
        check_channels(channels)
        if num_images < 1 or min(size) < MIN_SIDE:
            raise UserError(
                f"phantom source needs an image and sides of {MIN_SIDE} pixels, got "
                f"num_images={num_images}, size={tuple(size)}"
            )
        self.num_images = num_images
        self.size = (int(size[0]), int(size[1]))
        self.seed = seed
        self.channels = channels
        self.settings = settings
        self._rendered: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.num_images

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_rendered": {}}

    def record_id(self, index: int) -> str:
        """A name that holds all that decides the pixels."""
        check_index(index, len(self))
        world = f"settings{self.settings}/" if self.settings else ""
        height, width = self.size
        return f"phantom/{height}x{width}/seed{self.seed}/{world}{index}"

    def __getitem__(self, index: int) -> np.ndarray:
        from ultradino_jax.data.phantom.render import render_phantom

        check_index(index, len(self))
        if index not in self._rendered:
            phantom = render_phantom(
                index, seed=self.seed, size=self.size, settings=self.settings
            )
            pixels = np.repeat(phantom.image[:, :, None], self.channels, axis=2)
            pixels.flags.writeable = False
            self._rendered[index] = pixels
        return self._rendered[index]

    def digest(self) -> str:
        """sha256 over the record ids in order."""
        return digest_of(self.record_id(i) for i in range(len(self)))
