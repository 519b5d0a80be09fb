// Any processor: SSE2 on x86-64, NEON on aarch64.
#define BAM_ISA baseline
#define BAM_BYTES 16
#include "instantiate.h"

namespace bam {
const Tables* tables_baseline() { return baseline::all_tables("baseline"); }
} // namespace bam
