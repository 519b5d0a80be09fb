#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own header leaves vectors undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define BAM_ISA avx512
#define BAM_BYTES 64
#include "instantiate.h"

namespace bam {
const Tables* tables_avx512() {
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has ? avx512::all_tables("avx512") : nullptr;
}
} // namespace bam
#else
namespace bam {
const Tables* tables_avx512() { return nullptr; }
} // namespace bam
#endif
