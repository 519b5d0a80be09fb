#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define BAM_ISA avx2
#define BAM_BYTES 32
#include "instantiate.h"

namespace bam {
const Tables* tables_avx2() {
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c");
  return has ? avx2::all_tables("avx2") : nullptr;
}
} // namespace bam
#else
namespace bam {
const Tables* tables_avx2() { return nullptr; }
} // namespace bam
#endif
