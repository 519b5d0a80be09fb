#define BAM_ISA baseline
#define BAM_BYTES 16
#include "arithmetic.h"

namespace bam {
const Internals* internals_baseline() { return baseline::all_internals(); }
} // namespace bam
