// Fills the tests' table of one instruction set: include after defining BAM_ISA and BAM_BYTES.
#pragma once

#include "cpu/instantiate.h"
#include "internals.h"

namespace bam {
namespace BAM_ISA {

template <class A>
void exp_all(const A* x, A* out, int64_t n) {
  map_all(x, out, n, [](Vec<A> v) { return exp<A>(v); });
}
template <class A>
void reciprocal_all(const A* x, A* out, int64_t n) {
  map_all(x, out, n, [](Vec<A> v) { return reciprocal<A>(v); });
}
template <class A>
void relu_all(const A* x, A* out, int64_t n) {
  map_all(x, out, n, [](Vec<A> v) { return relu<A>(v); });
}
template <class A>
void maximum_all(const A* a, const A* b, A* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    const int left = int(n - i < kLanes<A> ? n - i : kLanes<A>);
    store_n(out + i, maximum<A>(load_n(a + i, left), load_n(b + i, left)), left);
  }
}

template <class A>
const Arithmetic<A>* arithmetic_of() {
  static const Arithmetic<A> table = {
      exp_all<A>, reciprocal_all<A>, relu_all<A>, maximum_all<A>};
  return &table;
}

inline const Internals* all_internals() {
  static const Internals internals = {arithmetic_of<float>(), arithmetic_of<double>()};
  return &internals;
}

} // namespace BAM_ISA
} // namespace bam
