"""The paper's tables of parameters and GFLOPs beside those of `bam_kernels.models`."""

from bam_kernels.paper.comparison import Comparison, Entry, compare, summary
from bam_kernels.paper.counting import Count, count
from bam_kernels.paper.printed import TABLES, Row, rows

__all__ = ["TABLES", "Comparison", "Count", "Entry", "Row", "compare", "count", "rows", "summary"]
