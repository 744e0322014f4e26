"""Systems: training loss and likelihood of AR, BD3-LM, MDLM and SEDD; one file each."""

from __future__ import annotations

from bd3lm.config import TrainConfig
from bd3lm.systems.autoregressive import Autoregressive
from bd3lm.systems.base import Denoiser, Scorer, System, sigma_of
from bd3lm.systems.block_diffusion import BlockDiffusion
from bd3lm.systems.masked_diffusion import MaskedDiffusion
from bd3lm.systems.score_entropy import ScoreEntropy

__all__ = [
    "SYSTEMS",
    "Autoregressive",
    "BlockDiffusion",
    "Denoiser",
    "MaskedDiffusion",
    "ScoreEntropy",
    "Scorer",
    "System",
    "build_system",
    "sigma_of",
]

SYSTEMS: dict[str, type[System]] = {
    system.name: system
    for system in (BlockDiffusion, MaskedDiffusion, ScoreEntropy, Autoregressive)
}


def build_system(cfg: TrainConfig, mask_id: int) -> System:
    """Build the system that the settings name.

    Raises:
        ConfigError: settings that this system cannot have.
    """
    return SYSTEMS[cfg.system].from_config(cfg, mask_id)
