"""Kernels of the accelerators, each beside the plain form that it must equal."""
