"""Measuring: what ``python -m bam_kernels bench`` and the suites in benchmarks/ run on."""
