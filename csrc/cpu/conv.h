// The dilated 3x3 convolutions (Eq. 4), the projection behind them, and their gradients.
#pragma once

#include "kernels.h"
#include "micro.h"

namespace bam {
namespace BAM_ISA {

template <class A>
struct Taps {
  int64_t at[9];
  explicit Taps(const Planes& g) {
    for (int tap = 0; tap < 9; ++tap)
      at[tap] = (tap / 3 - 1) * g.dilation * g.pitch + (tap % 3 - 1) * g.dilation;
  }
};

// Output channels [j, j + R) at V vectors from q on; logits [V * W] are added to.
template <int R, int V, class A>
BAM_NOINLINE void conv_tile(
    const Conv<A>& c, const Taps<A>& taps, int64_t j, int64_t q, A* logits) {
  constexpr int W = kLanes<A>;
  const Planes& g = *c.geometry;
  const int64_t h = c.hidden;
  Vec<A> t[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) t[r][v] = zero<A>();
  RowPointers<A> w(c.weight + j * h * 9, h * 9);
  const A* in = c.in + g.origin + q;
  for (int64_t i = 0; i < h; ++i, in += g.plane) {
    for (int tap = 0; tap < 9; ++tap) {
      const A* b = in + taps.at[tap];
      Vec<A> x[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[v] = load(b + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Vec<A> s = splat<A>(w[r]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) t[r][v] += s * x[v];
      }
      w.advance(1);
    }
  }
  const auto* words = static_cast<const typename VecTypes<A>::uint*>(c.mask);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Vec<A> scale = splat<A>(c.scale ? c.scale[j + r] : A(1));
    const Vec<A> shift = splat<A>(c.shift ? c.shift[j + r] : A(0));
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec<A> y = t[r][v] * scale + shift;
      if (c.relu) y = relu<A>(y);
      if (c.out) {
        Uints<A> pixels;
        std::memcpy(&pixels, words + q + v * W, sizeof pixels);
        store(c.out + (j + r) * g.plane + g.origin + q + v * W, (Vec<A>)((Uints<A>)y & pixels));
      }
      if (c.project)
        store(logits + v * W, load(logits + v * W) + splat<A>(c.project[j + r]) * y);
    }
  }
}

template <class A>
void conv(const Conv<A>& c, int64_t v0, int64_t v1) {
  constexpr int W = kLanes<A>;
  const Taps<A> taps(*c.geometry);
  auto tile = [&](int64_t q, auto vecs) {
    constexpr int V = decltype(vecs)::value;
    if (c.project) std::memset(c.logits + q, 0, V * W * sizeof(A));
    for_row_blocks(0, c.hidden, [&](int64_t j, auto rows) {
      conv_tile<decltype(rows)::value, V, A>(c, taps, j, q, c.logits + q);
    });
  };
  int64_t v = v0;
  for (; v + kVecs <= v1; v += kVecs) tile(v * W, std::integral_constant<int, kVecs>{});
  for (; v < v1; ++v) tile(v * W, std::integral_constant<int, 1>{});
}

template <class A>
void project(
    const A* in, const Planes& g, int64_t h, const A* weight, A* logits, int64_t v0, int64_t v1) {
  constexpr int W = kLanes<A>;
  for (int64_t q = v0 * W; q < v1 * W; q += W) {
    Vec<A> s = zero<A>();
    for (int64_t j = 0; j < h; ++j) s += splat<A>(weight[j]) * load(in + j * g.plane + g.origin + q);
    store(logits + q, s);
  }
}

template <class A>
void conv_weight_gradient(
    const A* dz, const A* in, const Planes& g, int64_t h, int64_t o0, int64_t o1, A* dw) {
  constexpr int W = kLanes<A>;
  const Taps<A> taps(g);
  const int64_t span = (g.span + W - 1) / W * W;  // behind the span dz is zero
  constexpr int64_t kChunk = 512;
  for (int64_t q = 0; q < span; q += kChunk) {
    const int64_t n = span - q < kChunk ? span - q : kChunk;
    for (int tap = 0; tap < 9; ++tap)
      inner<A>(
          o1 - o0, h, n, dz + o0 * g.plane + g.origin + q, g.plane,
          in + g.origin + q + taps.at[tap], g.plane, dw + o0 * h * 9 + tap, h * 9, 9, true);
  }
}

} // namespace BAM_ISA
} // namespace bam
