// Element-wise work on padded planes, a channel [j0, j1) at a time: batch norms and their gradients.
// The padding of every map is zero, before and after.
#pragma once

#include "kernels.h"
#include "micro.h"

namespace bam {
namespace BAM_ISA {

template <class A>
BAM_INLINE Vec<A> masked(Vec<A> v, const void* mask, int64_t q) {
  Uints<A> pixels;
  std::memcpy(&pixels, static_cast<const typename VecTypes<A>::uint*>(mask) + q, sizeof pixels);
  return (Vec<A>)((Uints<A>)v & pixels);
}

// Calls f(j, q) for the vectors of each channel, q from pixel (0, 0) on.
template <class A, class F>
BAM_INLINE void for_vectors(const Planes& g, F&& f) {
  for (int64_t q = 0; q < g.span; q += kLanes<A>) f(q);
}

template <class A>
void moments(
    const A* z, const Planes& g, const void* mask, const A* mean, int64_t j0, int64_t j1, A* out) {
  for (int64_t j = j0; j < j1; ++j) {
    const A* plane = z + j * g.plane + g.origin;
    Vec<A> total = zero<A>();
    if (mean) {
      const Vec<A> mu = splat<A>(mean[j]);
      for_vectors<A>(g, [&](int64_t q) {
        Vec<A> off = masked<A>(load(plane + q) - mu, mask, q);
        total += off * off;
      });
    } else {
      for_vectors<A>(g, [&](int64_t q) { total += load(plane + q); });
    }
    out[j] = sum<A>(total);
  }
}

template <class A>
void activate(
    const A* z, A* a, const Planes& g, const void* mask, const A* scale, const A* shift,
    int64_t j0, int64_t j1) {
  for (int64_t j = j0; j < j1; ++j) {
    const A* from = z + j * g.plane + g.origin;
    A* to = a + j * g.plane + g.origin;
    const Vec<A> s = splat<A>(scale ? scale[j] : A(1)), b = splat<A>(shift ? shift[j] : A(0));
    for_vectors<A>(g, [&](int64_t q) {
      store(to + q, masked<A>(relu<A>(load(from + q) * s + b), mask, q));
    });
  }
}

template <class A>
void project_gradient(
    const A* dq, const A* act, const Planes& g, const A* weight, A* du, A* dweight, int64_t j0,
    int64_t j1) {
  for (int64_t j = j0; j < j1; ++j) {
    const A* a = act + j * g.plane + g.origin;
    A* to = du + j * g.plane + g.origin;
    const Vec<A> w = splat<A>(weight[j]);
    Vec<A> total = zero<A>();
    for_vectors<A>(g, [&](int64_t q) {
      Vec<A> grad = load(dq + q), value = load(a + q);
      total += grad * value;
      store(to + q, (value > zero<A>()) ? w * grad : zero<A>());
    });
    dweight[j] = sum<A>(total);
  }
}

template <class A>
void relu_gradient(A* du, const A* act, const Planes& g, int64_t j0, int64_t j1) {
  for (int64_t j = j0; j < j1; ++j) {
    const A* a = act + j * g.plane + g.origin;
    A* d = du + j * g.plane + g.origin;
    for_vectors<A>(g, [&](int64_t q) {
      store(d + q, (load(a + q) > zero<A>()) ? load(d + q) : zero<A>());
    });
  }
}

template <class A>
void norm_sums(
    const A* du, const A* z, const Planes& g, const A* mean, const A* rstd, int64_t j0, int64_t j1,
    A* sums, A* products) {
  for (int64_t j = j0; j < j1; ++j) {
    const A *d = du + j * g.plane + g.origin, *x = z + j * g.plane + g.origin;
    const Vec<A> mu = splat<A>(mean[j]), r = splat<A>(rstd[j]);
    Vec<A> total = zero<A>(), product = zero<A>();
    for_vectors<A>(g, [&](int64_t q) {
      Vec<A> grad = load(d + q);
      total += grad;
      product += grad * ((load(x + q) - mu) * r);
    });
    sums[j] = sum<A>(total), products[j] = sum<A>(product);
  }
}

template <class A>
void norm_gradient(
    A* du, const A* z, const Planes& g, const void* mask, const A* mean, const A* rstd,
    const A* scale, const A* mean_gradient, const A* mean_product, int64_t j0, int64_t j1) {
  for (int64_t j = j0; j < j1; ++j) {
    A* d = du + j * g.plane + g.origin;
    const A* x = z + j * g.plane + g.origin;
    const Vec<A> mu = splat<A>(mean[j]), r = splat<A>(rstd[j]), s = splat<A>(scale[j]);
    const Vec<A> mg = splat<A>(mean_gradient[j]), mp = splat<A>(mean_product[j]);
    for_vectors<A>(g, [&](int64_t q) {
      Vec<A> grad = load(d + q) - mg - (load(x + q) - mu) * r * mp;
      store(d + q, masked<A>(grad * s, mask, q));
    });
  }
}

} // namespace BAM_ISA
} // namespace bam
