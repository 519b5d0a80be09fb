#include "internals.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define BAM_ISA avx2
#define BAM_BYTES 32
#include "arithmetic.h"

namespace bam {
const Internals* internals_avx2() { return avx2::all_internals(); }
} // namespace bam
#else
namespace bam {
const Internals* internals_avx2() { return nullptr; }
} // namespace bam
#endif
