"""Turn dialogue data into a tuned LLaMA, in JAX and Flax, on GPUs and TPU pods."""

__version__ = "0.1.0"
