"""What the kernels' tests share."""

from cuda_emulation import emulated, emulated_module  # noqa: F401
