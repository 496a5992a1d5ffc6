"""The sizes of clips that a pipeline takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

from hvcompile.errors import InputError

# Pipelines of diffusers name the same two numbers differently; the first attribute that a pipeline has is the one.
_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_scale_factor", "vae_spatial_compression_ratio", "vae_scale_factor")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_scale_factor", "vae_temporal_compression_ratio")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The sizes a pipeline takes: height and width in steps of ``spatial`` pixels, ``k * temporal + 1`` frames.

    Attributes:
        spatial: pixels of one transformer token along height and width (VAE scale x patch size), 1 where unknown.
        temporal: frames of one latent frame, 1 where unknown.

    """

    spatial: int
    temporal: int

    @classmethod
    def of(cls, pipe: Any) -> Self:
        """Read the grid of a loaded pipeline from its VAE's scale factors and its transformer's patch size.

        Pipelines of pictures that pack latents in squares say so by their image processor's own factor.
        """
        from hvcompile.app.denoisers import first_denoiser  # imports torch, which --help must not

        patch = getattr(first_denoiser(pipe).config, "patch_size", 1)
        patch = patch[-1] if isinstance(patch, list | tuple) else patch
        processor = getattr(getattr(pipe, "image_processor", None), "config", None)
        packed = int(getattr(processor, "vae_scale_factor", 1) or 1)
        spatial = math.lcm(_first(pipe, _SPATIAL) * (patch or 1), packed)
        return cls(spatial=spatial, temporal=_first(pipe, _TEMPORAL))

    def check(self, *, height: int | None, width: int | None, frames: int | None) -> None:
        """Raise InputError where a size given (None: the pipeline's own) is off the grid; names the nearest legal."""
        for name, value in (("height", height), ("width", width)):
            if value is not None and value % self.spatial:
                below = value - value % self.spatial
                near = " or ".join(str(size) for size in (below, below + self.spatial) if size)
                raise InputError(f"{name} is {value}, but this pipeline takes multiples of {self.spatial}: give {near}")
        if frames is not None and (frames - 1) % self.temporal:
            below = frames - (frames - 1) % self.temporal
            raise InputError(
                f"frames is {frames}, but this pipeline takes a multiple of {self.temporal}, plus 1: "
                f"give {below} or {below + self.temporal}"
            )


def _first(pipe: Any, names: tuple[str, ...]) -> int:
    return next((int(value) for name in names if (value := getattr(pipe, name, None)) is not None), 1)
