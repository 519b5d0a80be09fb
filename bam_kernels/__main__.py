"""``python -m bam_kernels``."""

import sys

from bam_kernels.cli import main

sys.exit(main())
