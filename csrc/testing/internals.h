// What the tests see of an instruction set beside its tables: arithmetic that is inlined wherever
// it is used. It is compiled as the kernels are, a file per instruction set, into their module.
#pragma once

#include <cstdint>

namespace bam {

template <class A>
struct Arithmetic {
  void (*exp)(const A* x, A* out, int64_t n);
  void (*reciprocal)(const A* x, A* out, int64_t n);
  void (*relu)(const A* x, A* out, int64_t n);
  void (*maximum)(const A* a, const A* b, A* out, int64_t n);
};

struct Internals {
  const Arithmetic<float>* f32;
  const Arithmetic<double>* f64;
};

// Null where this build has not got it; the processor may lack it still, as `tables_*` tell.
const Internals* internals_baseline();
const Internals* internals_avx2();
const Internals* internals_avx512();

} // namespace bam
