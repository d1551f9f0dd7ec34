"""pi0 and pi0.5 in PyTorch: the model, and the backend that loads, compiles and runs it."""

from openpi_flash_models.torch.backend import COMPILE_MODES, TorchBackend, load

__all__ = ["COMPILE_MODES", "TorchBackend", "load"]
