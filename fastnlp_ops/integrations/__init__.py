"""Compiled ops inside other packages' models. Each module imports its package; none is imported by fastnlp_ops."""
