"""Networks for 32x32 images, and the BatchNorm that ANP masks and perturbs."""

from models.noisy_batchnorm import NoisyBatchNorm, convert_noisy_batchnorm, noisy_layers
from models.registry import ARCHITECTURES, build_model

__all__ = ["ARCHITECTURES", "NoisyBatchNorm", "build_model", "convert_noisy_batchnorm", "noisy_layers"]
