"""Backends: each offers the same raw functions on tensors, without autograd and without checks."""
