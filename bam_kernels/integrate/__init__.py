"""Bringing BAM into existing networks."""

from bam_kernels.integrate.insert import insert_bam

__all__ = ["insert_bam"]
