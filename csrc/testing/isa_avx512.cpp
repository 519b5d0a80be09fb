#include "internals.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#if defined(__GNUC__) && !defined(__clang__)
// As in cpu/isa_avx512.cpp.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define BAM_ISA avx512
#define BAM_BYTES 64
#include "arithmetic.h"

namespace bam {
const Internals* internals_avx512() { return avx512::all_internals(); }
} // namespace bam
#else
namespace bam {
const Internals* internals_avx512() { return nullptr; }
} // namespace bam
#endif
