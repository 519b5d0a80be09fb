"""Builds bam_kernels; the metadata stands in pyproject.toml.

Nothing is compiled here, so that ``pip install .`` needs no torch, no compiler and no GPU: Triton
compiles the kernels at their first use.
"""

from setuptools import setup

setup()
