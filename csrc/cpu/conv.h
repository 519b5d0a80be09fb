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

// Where vectors start, in positions of the span, and how many lanes of each are its own.
template <int V>
struct Starts {
  int64_t q[V];
  int lanes[V];
  int first_row, last_row;  // of the taps' three that are not padding for all of the vectors
};

template <int V, class A>
BAM_INLINE Starts<V> starts_of(const Planes& g, int64_t first) {
  constexpr int W = kLanes<A>;
  Starts<V> s;
  for (int v = 0; v < V; ++v) {
    if (g.per_row) {
      const int64_t row = (first + v) / g.per_row, begin = (first + v) % g.per_row * W;
      s.q[v] = row * g.pitch + begin;
      s.lanes[v] = g.pitch - begin < W ? int(g.pitch - begin) : W;
    } else {
      s.q[v] = (first + v) * W, s.lanes[v] = W;
    }
  }
  const int64_t top = s.q[0] / g.pitch, bottom = (s.q[V - 1] + s.lanes[V - 1] - 1) / g.pitch;
  s.first_row = bottom < g.dilation ? 1 : 0;
  s.last_row = top + g.dilation >= g.height ? 1 : 2;
  return s;
}

// Output channels [j, j + R) at V vectors; their logits are added to. The weights of R channels lie
// side by side (`pack`) where they are packed.
template <int R, int V, class A>
BAM_NOINLINE void conv_tile(
    const Conv<A>& c, const Taps<A>& taps, int64_t j, const Starts<V>& s) {
  constexpr int W = kLanes<A>;
  const Planes& g = *c.geometry;
  const int64_t h = c.hidden;
  Vec<A> t[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) t[r][v] = zero<A>();
  const int64_t step = c.packed ? R : 1;
  RowPointers<A> w(c.weight + j * h * 9, c.packed ? 1 : h * 9);
  const A* in = c.in + g.origin;
  w.advance(3 * s.first_row * step);
  const int first_tap = 3 * s.first_row, last_tap = 3 * s.last_row + 3;
  const int64_t skipped = (9 - last_tap + first_tap) * step;
  for (int64_t i = 0; i < h; ++i, in += g.plane) {
    for (int tap = first_tap; tap < last_tap; ++tap) {
      const A* b = in + taps.at[tap];
      Vec<A> x[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[v] = load(b + s.q[v]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Vec<A> f = splat<A>(w[r]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) t[r][v] += f * x[v];
      }
      w.advance(step);
    }
    w.advance(skipped);
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
        std::memcpy(&pixels, words + s.q[v], sizeof pixels);
        A* to = c.out + (j + r) * g.plane + g.origin + s.q[v];
        const Vec<A> masked = (Vec<A>)((Uints<A>)y & pixels);
        if (s.lanes[v] == W) store(to, masked);
        else store_n(to, masked, s.lanes[v]);
      }
      if (c.project) {
        A* to = c.logits + s.q[v];
        const Vec<A> sum = (j + r ? load_n(to, s.lanes[v]) : zero<A>()) +
            splat<A>(c.project[j + r]) * y;
        store_n(to, sum, s.lanes[v]);
      }
    }
  }
}

template <class A>
void conv(const Conv<A>& c, int64_t v0, int64_t v1) {
  const Taps<A> taps(*c.geometry);
  auto tile = [&](int64_t v, auto vecs) {
    constexpr int V = decltype(vecs)::value;
    const Starts<V> starts = starts_of<V, A>(*c.geometry, v);
    for_row_blocks(0, c.hidden, [&](int64_t j, auto rows) {
      conv_tile<decltype(rows)::value, V, A>(c, taps, j, starts);
    });
  };
  int64_t v = v0;
  for (; v + kVecs <= v1; v += kVecs) tile(v, std::integral_constant<int, kVecs>{});
  for (; v < v1; ++v) tile(v, std::integral_constant<int, 1>{});
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
  // Of `in` so much at a time stays in L1 for all taps and outputs.
  constexpr int64_t kChunk = 512, kInputs = 16;
  for (int64_t q = 0; q < span; q += kChunk) {
    const int64_t n = span - q < kChunk ? span - q : kChunk;
    for (int64_t i = 0; i < h; i += kInputs) {
      const int64_t inputs = h - i < kInputs ? h - i : kInputs;
      for (int tap = 0; tap < 9; ++tap)
        inner<A>(
            o1 - o0, inputs, n, dz + o0 * g.plane + g.origin + q, g.plane,
            in + i * g.plane + g.origin + q + taps.at[tap], g.plane, dw + (o0 * h + i) * 9 + tap,
            h * 9, 9, true);
    }
  }
}

} // namespace BAM_ISA
} // namespace bam
