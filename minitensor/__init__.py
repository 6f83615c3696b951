"""minitensor: reverse-mode autograd for tensors."""
