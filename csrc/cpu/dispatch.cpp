// Which instruction set runs: decided once, from the processor; tests choose by name.
#include <atomic>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace bam {

// AVX-512's, with matrix units beside it.
const Tables* tables_amx() {
  static const Tables* found = []() -> const Tables* {
    const Tables* vectors = tables_avx512();
    const Amx* units = amx_units();
    if (!vectors || !units) return nullptr;
    static Tables both = *vectors;
    both.name = "amx", both.amx = units;
    return &both;
  }();
  return found;
}

static const Tables* best() {
  if (const Tables* t = tables_amx()) return t;
  if (const Tables* t = tables_avx512()) return t;
  if (const Tables* t = tables_avx2()) return t;
  return tables_baseline();
}

static std::atomic<const Tables*>& current() {
  static std::atomic<const Tables*> tables{best()};
  return tables;
}

const Tables& tables() { return *current().load(std::memory_order_relaxed); }

bool choose_tables(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    current() = best();
    return true;
  }
  for (const Tables* t : {tables_amx(), tables_avx512(), tables_avx2(), tables_baseline()}) {
    if (t && std::strcmp(t->name, name) == 0) {
      current() = t;
      return true;
    }
  }
  return false;
}

} // namespace bam
