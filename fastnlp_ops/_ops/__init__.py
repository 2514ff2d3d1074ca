"""What the dispatcher must know of every op beside its kernels: fake kernels and autograd formulas."""
