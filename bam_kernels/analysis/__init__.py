"""Looking at what BAM does: the attention maps of a network, and their picture."""

from bam_kernels.analysis.attention import AttentionMap, attention_maps

__all__ = ["AttentionMap", "attention_maps"]
