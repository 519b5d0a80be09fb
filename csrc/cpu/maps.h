// Element-wise work on hidden maps: [n positions][ld] values, ld whole vectors of channels. What is
// in the channels behind the last one stays there: no sum mixes channels but the projection's.
#pragma once

#include "kernels.h"
#include "product.h"

namespace bam {
namespace BAM_ISA {

// out[channel] = sum over positions of f(position, vector), by blocks: the sums of sums of a long
// map lose fewer digits than one long sum.
template <class A, class F>
BAM_INLINE void sum_positions(int64_t n, int64_t ld, A* out, F&& f) {
  constexpr int W = kLanes<A>;
  constexpr int64_t kBlock = 64;
  for (int64_t v = 0; v < ld; v += W) {
    Vec<A> total = zero<A>();
    for (int64_t p = 0; p < n; p += kBlock) {
      const int64_t end = n - p < kBlock ? n : p + kBlock;
      Vec<A> even = zero<A>(), odd = zero<A>();
      int64_t q = p;
      for (; q + 2 <= end; q += 2) {
        even += f(q, v);
        odd += f(q + 1, v);
      }
      if (q < end) even += f(q, v);
      total += even + odd;
    }
    store(out + v, total);
  }
}

// z * scale + shift and the ReLU, of n positions and `width` channels; either vector may be null.
template <class A>
BAM_INLINE void affine(
    const A* z, A* out, int64_t n, int64_t width, int64_t ld, const A* scale, const A* shift,
    bool with_relu) {
  constexpr int W = kLanes<A>;
  for (int64_t p = 0; p < n; ++p)
    for (int64_t v = 0; v < width; v += W) {
      Vec<A> y = load(z + p * ld + v);
      if (scale) y *= load(scale + v);
      if (shift) y += load(shift + v);
      store(out + p * ld + v, with_relu ? relu<A>(y) : y);
    }
}
template <class A>
void activate(const A* z, A* a, int64_t n, int64_t ld, const A* scale, const A* shift) {
  affine(z, a, n, ld, ld, scale, shift, true);
}

template <class A>
void add(A* to, const A* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<A>) store(to + i, load(to + i) + load(from + i));
}

// logits[p] = sum over channels j < h of weight[j] * a[p][j].
template <class A>
void project(const A* a, int64_t n, int64_t ld, int64_t h, const A* weight, A* logits) {
  constexpr int W = kLanes<A>;
  for (int64_t p = 0; p < n; ++p) {
    Vec<A> s = zero<A>();
    int64_t v = 0;
    for (; v + W <= h; v += W) s += load(weight + v) * load(a + p * ld + v);
    if (v < h) s += load_n(weight + v, int(h - v)) * load_n(a + p * ld + v, int(h - v));
    logits[p] = sum<A>(s);
  }
}

template <class A>
void moments(const A* z, int64_t n, int64_t ld, const A* mean, A* out) {
  if (mean)
    sum_positions<A>(n, ld, out, [&](int64_t p, int64_t v) {
      Vec<A> off = load(z + p * ld + v) - load(mean + v);
      return off * off;
    });
  else
    sum_positions<A>(n, ld, out, [&](int64_t p, int64_t v) { return load(z + p * ld + v); });
}

// As torch's threshold_backward: where the output is NaN the gradient passes.
template <class A>
BAM_INLINE Vec<A> through_relu(Vec<A> grad, Vec<A> out) {
  return (out <= zero<A>()) ? zero<A>() : grad;
}

template <class A>
void project_gradient(
    const A* dq, const A* act, int64_t n, int64_t ld, const A* weight, A* du, A* dweight) {
  sum_positions<A>(n, ld, dweight, [&](int64_t p, int64_t v) {
    const Vec<A> grad = splat<A>(dq[p]), value = load(act + p * ld + v);
    store(du + p * ld + v, through_relu<A>(load(weight + v) * grad, value));
    return grad * value;
  });
}

template <class A>
BAM_INLINE void relu_gradient(A* du, const A* act, int64_t n, int64_t width, int64_t ld) {
  for (int64_t p = 0; p < n; ++p)
    for (int64_t at = p * ld; at < p * ld + width; at += kLanes<A>)
      store(du + at, through_relu<A>(load(du + at), load(act + at)));
}

template <class A>
void norm_sums(
    const A* du, const A* z, int64_t n, int64_t ld, const A* mean, const A* rstd, A* sums,
    A* products) {
  moments<A>(du, n, ld, nullptr, sums);
  sum_positions<A>(n, ld, products, [&](int64_t p, int64_t v) {
    const int64_t at = p * ld + v;
    return load(du + at) * ((load(z + at) - load(mean + v)) * load(rstd + v));
  });
}

template <class A>
void norm_gradient(
    A* du, const A* z, int64_t n, int64_t ld, const A* mean, const A* rstd, const A* scale,
    const A* mean_gradient, const A* mean_product) {
  for (int64_t p = 0; p < n; ++p)
    for (int64_t v = 0; v < ld; v += kLanes<A>) {
      const int64_t at = p * ld + v;
      Vec<A> grad = load(du + at);
      if (mean_gradient) {  // else known statistics, through which nothing flows: not 0 * infinity
        Vec<A> x = (load(z + at) - load(mean + v)) * load(rstd + v);
        grad = grad - load(mean_gradient + v) - x * load(mean_product + v);
      }
      store(du + at, grad * load(scale + v));
    }
}

} // namespace BAM_ISA
} // namespace bam
