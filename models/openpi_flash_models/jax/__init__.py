"""pi0 and pi0.5 in JAX: the model, and the backend that loads, compiles and runs it."""

from openpi_flash_models.jax.backend import JaxBackend, load

__all__ = ["JaxBackend", "load"]
