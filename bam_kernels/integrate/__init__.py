"""Bringing BAM into existing networks."""

from bam_kernels.integrate.convert import convert_state_dict
from bam_kernels.integrate.insert import insert_bam
from bam_kernels.integrate.replace import replace_bam
from bam_kernels.integrate.report import ReplaceReport
from bam_kernels.integrate.strip import strip

__all__ = ["ReplaceReport", "convert_state_dict", "insert_bam", "replace_bam", "strip"]
