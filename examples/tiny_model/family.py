"""What a family of models is asked for; the training, publishing and checking of them is the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import clips
import torch

SIZE: Final = {"num_frames": clips.NUM_FRAMES, "height": clips.HEIGHT, "width": clips.WIDTH}
"""Of the clips that the models are trained on, as arguments of a pipeline."""

LATENT_CHANNELS: Final = 16
"""Of every family's VAE; a latent value stands for 8 x 8 pixels and 4 frames, the first frame alone."""


class Family(ABC):
    """A pipeline's class and all that is its own.

    Attributes:
        pipeline: the class of diffusers.
        directory: where ``publish.py`` writes the trained pipeline, in the layout of diffusers.
        trained: the parts that learn together once the VAE is trained, the transformer first.
        compiles_vae: whether compiling the VAE makes its training faster on a CPU.
        embeds_guidance: whether the guidance scale is an input of the transformer; if not, a step takes two passes.

    """

    pipeline: ClassVar[Any]
    directory: ClassVar[Path]
    trained: ClassVar[tuple[str, ...]]
    compiles_vae: ClassVar[bool]
    embeds_guidance: ClassVar[bool]

    @abstractmethod
    def autoencoder(self) -> Any:
        """Build the VAE, with the weights that its training begins with."""

    @abstractmethod
    def moments(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Mean and log variance of the latents: (batch, 32, latent frames, height, width)."""

    @abstractmethod
    def pixels(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Decode, without clamping: (batch, 3, frames, height, width), -1 to 1."""

    @abstractmethod
    def note_statistics(self, vae: Any, latents: torch.Tensor) -> None:
        """Let the VAE's configuration say how latents, of which these are a sample, are brought to zero and one."""

    @abstractmethod
    def normalised(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the transformer takes them and the pipeline's decoding expects them."""

    @abstractmethod
    def new_pipeline(self, vae: Path) -> Any:
        """Put the trained VAE and the other parts, with the weights that their training begins with, together."""

    @abstractmethod
    def tokenise(self, pipe: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tokenise as the pipeline does, padding at the end left out where it may be: each (captions, tokens)."""

    @abstractmethod
    def encode_text(self, parts: dict[str, Any], tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Encode as the pipeline does: the transformer's inputs that tell of text."""

    @abstractmethod
    def is_modulation(self, name: str) -> bool:
        """Whether a layer of the transformer's blocks computes shifts, scales and gates from the timestep."""

    @abstractmethod
    def blocks(self, transformer: Any) -> list[torch.nn.Module]:
        """List the transformer's repeated blocks."""

    @abstractmethod
    def prepare(self, transformer: Any, text: dict[str, torch.Tensor]) -> None:
        """Make the transformer ready to be trained with texts that ``tokenise`` gave; what is saved stays as it is."""

    def finer(self, transformer: Any) -> Any:
        """Build a transformer with a token for each latent value, whose weights come from one of larger patches.

        Raises:
            ValueError: nobody has said how for this family.

        """
        raise ValueError(f"a {type(transformer).__name__} can't be given finer patches here")

    @abstractmethod
    def finish(self, transformer: Any) -> None:
        """Change the trained transformer before it is published."""


@torch.no_grad()
def initialise_autoencoder(vae: Any) -> Any:
    """Make a VAE start as short linear paths: residuals that give nothing yet, other convolutions that keep scale."""
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            if name.endswith((".conv2", ".conv2.conv", ".proj")):
                module.weight.zero_()
            else:
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                module.bias.zero_()
    vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
    vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0  # the log variance: under much noise nothing local is ever learnt
    return vae


@torch.no_grad()
def damp_clocks(transformer: Any, slow: float) -> None:
    """Damp the columns that read sinusoids of the timestep much faster than ``slow``, in radians a timestep unit."""
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(
            ("timestep_embedder.linear_1", "time_embedder.linear_1")
        ):
            half = module.in_features // 2
            exponent = torch.arange(half) / half
            frequency = torch.exp(-torch.tensor(10_000.0).log() * exponent).repeat(2)  # radians a timestep unit
            module.weight *= 1 / (1 + (frequency / slow) ** 2)


SLOW: Final = 1e-2
"""Radians a timestep unit (of 1000): faster sinusoids of the timestep hardly count when training begins.

They tell nothing of how noisy the latents are but make every step unlike the one before.
"""
