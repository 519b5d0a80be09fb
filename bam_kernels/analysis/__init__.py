"""Looking at what BAM does: attention maps, class selectivity, and their pictures (Sec. 6)."""

from bam_kernels.analysis.attention import AttentionMap, attention_maps
from bam_kernels.analysis.map_statistics import GlobalStatistics
from bam_kernels.analysis.process import (
    ClassAttention,
    Process,
    attention_process,
    class_attention,
    global_statistics,
    running,
)
from bam_kernels.analysis.process_figure import draw_class_attention, draw_process
from bam_kernels.analysis.selectivity import Selectivity, class_selectivity, selectivity_index
from bam_kernels.analysis.selectivity_figure import draw_selectivity
from bam_kernels.analysis.stages import stage_layers

__all__ = [
    "AttentionMap",
    "ClassAttention",
    "GlobalStatistics",
    "Process",
    "Selectivity",
    "attention_maps",
    "attention_process",
    "class_attention",
    "class_selectivity",
    "draw_class_attention",
    "draw_process",
    "draw_selectivity",
    "global_statistics",
    "running",
    "selectivity_index",
    "stage_layers",
]
