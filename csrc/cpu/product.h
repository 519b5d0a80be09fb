// One product of matrices for all layers: rows of scalars, each broadcast, times rows of vectors,
// in tiles of accumulators that stay in registers. And the transposition that makes such rows.
#pragma once

#include "kernels.h"
#include "vec.h"

#define BAM_NOINLINE __attribute__((noinline))

namespace bam {
namespace BAM_ISA {

// A tile of V vectors has at most so many rows: it, V vectors and a broadcast fit the registers, of
// which there are 32, or 16 before AVX-512.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostVecs = 4;
template <int V>
constexpr int kMostRows = V == 4 ? 6 : V == 3 ? 8 : 12;
#else
constexpr int kMostVecs = 2;
template <int V>
constexpr int kMostRows = V == 2 ? 6 : 12;
#endif

// Scalars of R rows, by few base pointers: x86 addresses reach base + {0, 1, 2} * stride.
template <int R, bool DENSE, class A>
struct Scalars {
  static constexpr int kPointers = DENSE ? 1 : (R + 2) / 3;
  const A* p[kPointers];
  int64_t stride;
  BAM_INLINE Scalars(const A* from, int64_t s) : stride(s) {
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) p[i] = from + 3 * i * s;
  }
  BAM_INLINE A operator[](int r) const { return DENSE ? p[0][r] : p[r / 3][r % 3 * stride]; }
  BAM_INLINE void advance(int64_t n) {
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) p[i] += n;
  }
};

// Rows [r0, r0 + R) and vectors [v0, v0 + V) of `product`.
template <int R, int V, bool DENSE, class A>
BAM_NOINLINE void product_tile(const Product<A>& m, int64_t r0, int64_t v0) {
  constexpr int W = kLanes<A>;
  // A small tile would wait for its own sums: it takes two or four steps of k side by side.
  constexpr int U = R * V <= 2 ? 4 : R * V <= 5 ? 2 : 1;
  Vec<A> t[U][R][V];
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) t[u][r][v] = zero<A>();
  for (int64_t i = 0; i < m.count; ++i) {
    Scalars<R, DENSE, A> a(m.terms[i].a + r0 * m.row, m.row);
    const A* b = m.terms[i].b + v0 * W;
    auto step = [&](Vec<A> (&sums)[R][V]) {
      Vec<A> x[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[v] = load(b + v * W);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        Vec<A> s = splat<A>(a[r]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] += s * x[v];
      }
      a.advance(m.step);
      b += m.b_step;
    };
    int64_t k = 0;
    for (; k + U <= m.k; k += U)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) step(t[u]);
    for (; k < m.k; ++k) step(t[0]);
  }
  A* out = m.out + r0 * m.out_row + v0 * W;
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec<A> sum = t[0][r][v];
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) sum += t[u][r][v];
      A* to = out + r * m.out_row + v * W;
      // What was there is added last: sums of sums lose fewer digits than one long sum.
      store(to, m.accumulate ? load(to) + sum : sum);
    }
}

template <int V, bool DENSE, class A>
BAM_INLINE void product_rows(const Product<A>& m, int64_t v0) {
  constexpr int kMost = kMostRows<V>;
  for (int64_t r = 0; r < m.rows;) {
    // Even tiles: one of few rows waits for its own sums.
    const int64_t left = m.rows - r, tiles = (left + kMost - 1) / kMost;
    int64_t size = (left + tiles - 1) / tiles;
    auto run = [&](auto rows) {
      constexpr int R = decltype(rows)::value;
      if constexpr (R <= kMost) product_tile<R, V, DENSE, A>(m, r, v0);
      size = R;
    };
    switch (size) {
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 2: run(std::integral_constant<int, 2>{}); break;
      case 3: run(std::integral_constant<int, 3>{}); break;
      case 4: run(std::integral_constant<int, 4>{}); break;
      case 5: run(std::integral_constant<int, 5>{}); break;
      case 6:
      case 7: run(std::integral_constant<int, 6>{}); break;
      case 8:
      case 9: run(std::integral_constant<int, 8>{}); break;
      case 10:
      case 11: run(std::integral_constant<int, 10>{}); break;
      default: run(std::integral_constant<int, 12>{}); break;
    }
    r += size;
  }
}

template <class A>
void product(const Product<A>& m) {
  for (int64_t v = 0; v < m.vecs;) {
    const int64_t left = m.vecs - v, tiles = (left + kMostVecs - 1) / kMostVecs;
    const int64_t size = (left + tiles - 1) / tiles;
    auto run = [&](auto vecs) {
      constexpr int V = decltype(vecs)::value;
      if constexpr (V <= kMostVecs) {
        if (m.row == 1) product_rows<V, true, A>(m, v);
        else product_rows<V, false, A>(m, v);
      }
    };
    switch (size) {
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 2: run(std::integral_constant<int, 2>{}); break;
      case 3: run(std::integral_constant<int, 3>{}); break;
      default: run(std::integral_constant<int, 4>{}); break;
    }
    v += size;
  }
}

#if defined(__AVX512F__)
// Sixteen rows become sixteen columns.
BAM_INLINE void transpose_16(__m512 (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}
#endif

// to[(k / period) * far + (k % period) * near + r] = from[r * from_row + k] for r < rows, k < length;
// 0 for rows <= r < stored.
template <class A>
void transpose_taps(
    const A* from, int64_t from_row, int64_t rows, int64_t length, A* to, int64_t period,
    int64_t near, int64_t far, int64_t stored) {
  constexpr int W = kLanes<A>;
  for (int64_t r = 0; r < stored; r += W) {
    const int some = int(rows - r < W ? rows - r : W), kept = int(stored - r < W ? stored - r : W);
    A* line = to + r;  // where column k goes
    int64_t in_period = 0;
    auto next = [&] {
      A* now = line;
      line += near;
      if (++in_period == period) in_period = 0, line += far - period * near;
      return now;
    };
    for (int64_t k = 0; k < length; k += W) {
      const int n = int(length - k < W ? length - k : W);
      const A* block = from + r * from_row + k;
#if defined(__AVX512F__)
      if constexpr (std::is_same_v<A, float>) {
        __m512 v[16];
        if (some == W && n == W && kept == W) {
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) v[i] = (__m512)load(block + i * from_row);
          transpose_16(v);
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) store(next(), (Vec<float>)v[i]);
          continue;
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          v[i] = i < some ? (__m512)load_n(block + i * from_row, n) : _mm512_setzero_ps();
        transpose_16(v);
        for (int i = 0; i < n; ++i) store_n(next(), (Vec<float>)v[i], kept);
        continue;
      }
#endif
      for (int i = 0; i < n; ++i) {
        A* out = next();
        for (int j = 0; j < kept; ++j) out[j] = j < some ? block[j * from_row + i] : A(0);
      }
    }
  }
}
template <class A>
void transpose(
    const A* from, int64_t from_row, int64_t rows, int64_t length, A* to, int64_t to_row,
    int64_t stored) {
  transpose_taps(from, from_row, rows, length, to, 1, int64_t(0), to_row, stored);
}

// Whether lines of x are to be copied side by side: converted, or because so far apart they share
// few places of L1.
template <class S>
BAM_INLINE bool lines_collide(int64_t line) {
  return sizeof(S) == 2 || line * int64_t(sizeof(S)) % 512 == 0;
}

// n values in the accumulator's type.
template <class S>
inline void widen_row(const S* from, Acc<S>* to, int64_t n) {
  constexpr int W = kLanes<Acc<S>>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store_n(to + i, load_n(from + i, int(n - i)), int(n - i));
}

} // namespace BAM_ISA
} // namespace bam
