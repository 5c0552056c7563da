"""How fast a run goes."""

import contextlib
import time

import jax

from ultradino_jax.data.crops import CropConfig
from ultradino_jax.data.masking import mask_buffer_length
from ultradino_jax.models.dino_head import head_flops
from ultradino_jax.models.vit import forward_flops
from ultradino_jax.pretraining.networks import Modules
from ultradino_jax.run.settings import FeedSettings

# Dense bfloat16 peak per device in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
}


class Meter:
    """Speed since the last reading."""

    def __init__(self, flops_per_step: float, batch_size: int, dtype: str):
        self.flops_per_step, self.batch_size = flops_per_step, batch_size
        peak = peak_flops(jax.devices()[0]) if dtype == "bfloat16" else None
        self.peak = peak and peak * jax.device_count()
        self.last = None
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self.start, self.steps, self.waited = time.monotonic(), 0, 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Count the time inside as waiting for data."""
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def read(self) -> dict[str, float]:
        """Rates since the last reading; starts a new interval.

        With no step since, as when a checkpoint waits for the step just logged, the
        last reading again.
        """
        if self.steps == 0 and self.last:
            return self.last
        elapsed = time.monotonic() - self.start
        seconds = elapsed / max(self.steps, 1)
        flops = self.flops_per_step / seconds
        timing = {
            "seconds_per_step": seconds,
            "images_per_second": self.batch_size / seconds,
            "data_wait": self.waited / elapsed,
            "gflops_per_second": flops / 1e9,
        }
        if self.peak:
            timing["mfu"] = flops / self.peak
        self.reset()
        self.last = timing
        return timing


# jaxlib comes without types, so Device reads as a variable.
def peak_flops(
    device: jax.Device,  # pyright: ignore[reportInvalidTypeForm]
) -> float | None:
    """The device's bfloat16 peak in FLOP/s, None when it is not in the table."""
    return peak_of(device.device_kind)


def peak_of(kind: str) -> float | None:
    """The same for a device's name."""
    for name, peak in PEAK_FLOPS.items():
        if name.lower() in kind.lower():
            return peak
    return None


def step_flops(
    modules: Modules, crops: CropConfig, feed: FeedSettings, channels: int
) -> float:
    """Operations of one step: teacher forward + 3 x student forward, by formula."""
    backbone, b = modules.backbone, feed.batch_size
    assert not isinstance(backbone.drop_path, tuple)  # that is for fine-tuning
    keep = 1 - backbone.drop_path
    whole, part = (
        (side // backbone.patch_size) ** 2
        for side in (crops.global_size, crops.local_size)
    )
    extra = 1 + backbone.num_registers
    g = forward_flops(backbone, whole + extra, channels)
    g_kept = forward_flops(backbone, whole + extra, channels, keep)
    l_kept = forward_flops(backbone, part + extra, channels, keep)
    masked = mask_buffer_length(2 * b, whole, feed.mask_probability, feed.mask_ratio)
    head = head_flops(modules.dino_head, backbone.embed_dim)
    patch_head = head_flops(modules.ibot_head or modules.dino_head, backbone.embed_dim)
    teacher = 2 * b * (g + head) + masked * patch_head
    crops_cost = 2 * (g_kept + head) + crops.num_local * (l_kept + head)
    return teacher + 3 * (b * crops_cost + masked * patch_head)
