// Fills the tables of one instruction set: include after defining BAM_ISA and BAM_BYTES.
#pragma once

#include "conv.h"
#include "gradient.h"
#include "reduce.h"

namespace bam {
namespace BAM_ISA {

template <class S>
void narrow_all(const Acc<S>* from, S* to, int64_t n) {
  constexpr int W = kLanes<Acc<S>>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store_n(to + i, load_n(from + i, int(n - i)), int(n - i));
}

template <class A, class F>
BAM_INLINE void map_all(const A* from, A* to, int64_t n, F&& f) {
  constexpr int W = kLanes<A>;
  for (int64_t i = 0; i < n; i += W) {
    const int left = int(n - i < W ? n - i : W);
    store_n(to + i, f(load_n(from + i, left)), left);
  }
}
template <class A>
void exp_negative(const A* from, A* to, int64_t n) {
  map_all(from, to, n, [](Vec<A> v) { return exp<A>(zero<A>() - v); });
}
template <class A>
void sigmoid_all(const A* from, A* to, int64_t n) {
  map_all(from, to, n, [](Vec<A> v) { return sigmoid<A>(v); });
}
template <class A>
void sigmoid_slope(const A* from, A* to, int64_t n) {
  map_all(from, to, n, [](Vec<A> v) {
    Vec<A> m = sigmoid<A>(v);
    return m * (splat(A(1)) - m);
  });
}

template <class S, class A = Acc<S>>
void linear(
    const S* w, const A* x, int64_t outs, int64_t ins, const A* scale, const A* shift,
    bool with_relu, A* y) {
  for (int64_t i = 0; i < outs; ++i) {
    A value = dot(w + i * ins, x, ins) * (scale ? scale[i] : A(1)) + (shift ? shift[i] : A(0));
    y[i] = with_relu && value < A(0) ? A(0) : value;
  }
}

template <class S>
const Kernels<S>* table_of() {
  static const Kernels<S> table = {
      kLanes<Acc<S>>,
      reduce_scratch<S>,
      reduce<S>,
      gate<S>,
      gate_gradient<S>,
      gradient_scratch<Acc<S>>,
      input_gradient<S>,
      weight_gradient_scratch<Acc<S>>,
      weight_gradient<S>,
      widen_row<S>,
      narrow_all<S>,
      linear<S>,
  };
  return &table;
}
template <class A>
const WideKernels<A>* wide_table_of() {
  static const WideKernels<A> table = {
      kLanes<A>,
      transpose<A>,
      transpose_taps<A>,
      product<A>,
      conv<A>,
      conv_weight_gradient<A>,
      add<A>,
      project<A>,
      moments<A>,
      activate<A>,
      project_gradient<A>,
      norm_sums<A>,
      norm_gradient<A>,
      exp_negative<A>,
      sigmoid_all<A>,
      sigmoid_slope<A>,
  };
  return &table;
}

inline const Tables* all_tables(const char* name) {
  static const Tables tables = {
      name,
      table_of<float>(),
      table_of<double>(),
      table_of<bf16>(),
      table_of<f16>(),
      wide_table_of<float>(),
      wide_table_of<double>(),
      nullptr,
  };
  return &tables;
}

} // namespace BAM_ISA
} // namespace bam
