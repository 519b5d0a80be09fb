// The two loops in which all multiplications of matrices happen, on tiles of accumulators that stay
// in registers; each is compiled for few tile sizes, in the accumulator's type alone.
#pragma once

#include "vec.h"

#define BAM_NOINLINE __attribute__((noinline))

namespace bam {
namespace BAM_ISA {

// A tile of `outer` is kRows x kVecs vectors and one of `inner` kRows / 2 x kColumns: with 32
// registers 8 x 3 and 4 x 4, with 16 registers 4 x 3 and 4 x 2, so that the tile, a row of operands
// and a broadcast fit.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
constexpr int kColumns = 4;
#else
constexpr int kRows = 4;
constexpr int kColumns = 2;
#endif
constexpr int kVecs = 3;

// Rows r of a matrix, by few base pointers: x86 addresses reach base + {0, 1, 2} * stride.
template <class A>
struct RowPointers {
  const A *p0, *p3, *p6;
  int64_t stride;
  BAM_INLINE RowPointers(const A* p, int64_t s) : p0(p), p3(p + 3 * s), p6(p + 6 * s), stride(s) {}
  BAM_INLINE A operator[](int r) const {
    return r < 3 ? p0[r * stride] : r < 6 ? p3[(r - 3) * stride] : p6[(r - 6) * stride];
  }
  BAM_INLINE void advance(int64_t n) { p0 += n, p3 += n, p6 += n; }
};

// out[r][v] (+)= sum over k of a[r * row + k * step] * b[k * b_step + v]; a tile of one vector has
// `lanes` of them, a wider one all.
template <int R, int V, class A>
BAM_NOINLINE void outer_tile(
    int64_t k_count, const A* a, int64_t row, int64_t step, const A* b, int64_t b_step, int lanes,
    A* out, int64_t ld, bool accumulate) {
  constexpr int W = kLanes<A>;
  Vec<A> t[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) t[r][v] = zero<A>();
  RowPointers<A> w(a, row);
  for (int64_t k = 0; k < k_count; ++k) {
    Vec<A> x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = V == 1 ? load_n(b, lanes) : load(b + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec<A> s = splat<A>(w[r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) t[r][v] += s * x[v];
    }
    w.advance(step);
    b += b_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      A* to = out + r * ld + v * W;
      if (V == 1) store_n(to, accumulate ? load_n(to, lanes) + t[r][v] : t[r][v], lanes);
      else store(to, accumulate ? load(to) + t[r][v] : t[r][v]);
    }
}

// Calls f(r, R) for blocks of rows in [begin, end): kRows at a time, then 4, then 1.
template <class F>
BAM_INLINE void for_row_blocks(int64_t begin, int64_t end, F&& f) {
  int64_t r = begin;
  for (; r + kRows <= end; r += kRows) f(r, std::integral_constant<int, kRows>{});
  if constexpr (kRows > 4)
    for (; r + 4 <= end; r += 4) f(r, std::integral_constant<int, 4>{});
  for (; r < end; ++r) f(r, std::integral_constant<int, 1>{});
}

// w [rows][k] with the rows of each block side by side: [block][k][rows of the block].
template <class A>
void pack(const A* w, int64_t rows, int64_t k, A* out) {
  for_row_blocks(0, rows, [&](int64_t r, auto block) {
    constexpr int R = decltype(block)::value;
    const A* from = w + r * k;
    A* to = out + r * k;
    for (int64_t i = 0; i < k; ++i)
      for (int j = 0; j < R; ++j) to[i * R + j] = from[j * k + i];
  });
}

// out [rows][n] (+)= columns [k0, k0 + k_count) of a packed matrix [rows][k] . b [k_count][n].
template <class A>
BAM_NOINLINE void outer_packed(
    int64_t rows, int64_t n, int64_t k_count, const A* packed, int64_t k, int64_t k0, const A* b,
    int64_t b_step, A* out, int64_t ld, bool accumulate) {
  constexpr int W = kLanes<A>;
  auto tile = [&](int64_t i, auto vecs, int lanes) {
    for_row_blocks(0, rows, [&](int64_t r, auto block) {
      constexpr int R = decltype(block)::value;
      outer_tile<R, decltype(vecs)::value, A>(
          k_count, packed + r * k + k0 * R, 1, R, b + i, b_step, lanes, out + r * ld + i, ld,
          accumulate);
    });
  };
  int64_t i = 0;
  for (; i + kVecs * W <= n; i += kVecs * W) tile(i, std::integral_constant<int, kVecs>{}, W);
  for (; i < n; i += W)
    tile(i, std::integral_constant<int, 1>{}, n - i < W ? int(n - i) : W);
}

// out [rows][n] (+)= a [rows][k_count] . b [k_count][n], with the strides of `outer_tile`.
template <class A>
BAM_NOINLINE void outer(
    int64_t rows, int64_t n, int64_t k_count, const A* a, int64_t row, int64_t step, const A* b,
    int64_t b_step, A* out, int64_t ld, bool accumulate) {
  constexpr int W = kLanes<A>;
  int64_t i = 0;
  for (; i + kVecs * W <= n; i += kVecs * W)
    for_row_blocks(0, rows, [&](int64_t r, auto block) {
      outer_tile<decltype(block)::value, kVecs, A>(
          k_count, a + r * row, row, step, b + i, b_step, W, out + r * ld + i, ld, accumulate);
    });
  for (; i < n; i += W) {
    const int lanes = n - i < W ? int(n - i) : W;
    for_row_blocks(0, rows, [&](int64_t r, auto block) {
      outer_tile<decltype(block)::value, 1, A>(
          k_count, a + r * row, row, step, b + i, b_step, lanes, out + r * ld + i, ld, accumulate);
    });
  }
}

// Matrices one behind the other, which are one long sum for `inner`.
struct Several {
  int64_t count, a, b;  // how many; from one to the next
};

// out[r * out_row + c * out_column] (+)= sum over k < n of a[r * a_row + k] * b[c * b_row + k], and
// over `several`.
template <int R, int C, class A>
BAM_NOINLINE void inner_tile(
    int64_t n, const A* a, int64_t a_row, const A* b, int64_t b_row, Several several, A* out,
    int64_t out_row, int64_t out_column, bool accumulate) {
  constexpr int W = kLanes<A>;
  Vec<A> t[R * C];
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) t[i] = zero<A>();
  for (int64_t m = 0; m < several.count; ++m, a += several.a, b += several.b) {
    int64_t k = 0;
    for (; k + W <= n; k += W) {
      Vec<A> x[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) x[c] = load(b + c * b_row + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Vec<A> y = load(a + r * a_row + k);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) t[r * C + c] += y * x[c];
      }
    }
    if (k < n) {
      const int left = int(n - k);
      Vec<A> x[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) x[c] = load_n(b + c * b_row + k, left);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Vec<A> y = load_n(a + r * a_row + k, left);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) t[r * C + c] += y * x[c];
      }
    }
  }
  A sums[R * C];
#if defined(__AVX512F__)
  if constexpr (R * C == 16 && std::is_same_v<A, float>) {
    store(sums, sums_of_16(t));
  } else
#endif
  {
#pragma GCC unroll 16
    for (int i = 0; i < R * C; ++i) sums[i] = sum<A>(t[i]);
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      A* to = out + r * out_row + c * out_column;
      *to = (accumulate ? *to : A(0)) + sums[r * C + c];
    }
}

// out [rows][columns] (+)= a [rows][n] . b [columns][n]^T, summed over `several`.
template <class A>
BAM_NOINLINE void inner_several(
    int64_t rows, int64_t columns, int64_t n, const A* a, int64_t a_row, const A* b, int64_t b_row,
    Several several, A* out, int64_t out_row, int64_t out_column, bool accumulate) {
  auto run = [&](int64_t r, auto R, int64_t c, auto C) {
    inner_tile<decltype(R)::value, decltype(C)::value, A>(
        n, a + r * a_row, a_row, b + c * b_row, b_row, several, out + r * out_row + c * out_column,
        out_row, out_column, accumulate);
  };
  using Four = std::integral_constant<int, 4>;
  using Wide = std::integral_constant<int, kColumns>;
  using One = std::integral_constant<int, 1>;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    int64_t c = 0;
    for (; c + kColumns <= columns; c += kColumns) run(r, Four{}, c, Wide{});
    for (; c < columns; ++c) run(r, Four{}, c, One{});
  }
  for (; r < rows; ++r) {
    int64_t c = 0;
    for (; c + kColumns <= columns; c += kColumns) run(r, One{}, c, Wide{});
    for (; c < columns; ++c) run(r, One{}, c, One{});
  }
}

template <class A>
void inner(
    int64_t rows, int64_t columns, int64_t n, const A* a, int64_t a_row, const A* b, int64_t b_row,
    A* out, int64_t out_row, int64_t out_column, bool accumulate) {
  inner_several<A>(
      rows, columns, n, a, a_row, b, b_row, {1, 0, 0}, out, out_row, out_column, accumulate);
}

// Rows [rows][n] in the accumulator's type: `from` itself, or converted into scratch [rows][ld].
template <class S>
BAM_INLINE const Acc<S>* wide_rows(
    const S* from, int64_t stride, int64_t rows, int64_t n, Acc<S>* scratch, int64_t& ld) {
  if constexpr (sizeof(S) != 2) {
    ld = stride;
    return from;
  } else {
    constexpr int W = kLanes<float>;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < n; i += W) {
        const int lanes = n - i < W ? int(n - i) : W;
        store_n(scratch + r * ld + i, load_n(from + r * stride + i, lanes), lanes);
      }
    return scratch;
  }
}

} // namespace BAM_ISA
} // namespace bam
