"""Bringing BAM into existing networks."""

from bam_kernels.integrate.insert import insert_bam
from bam_kernels.integrate.strip import strip

__all__ = ["insert_bam", "strip"]
