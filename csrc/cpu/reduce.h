// Average pool and 1x1 reduction (heads of Eq. 3 and 4) from one read of x.
#pragma once

#include "maps.h"

namespace bam {
namespace BAM_ISA {

// Channels at a time: 16 KiB of a reduction to 64 stay in L1.
constexpr int64_t kReduceChannels = 64;
// Positions at a time: of as many channels they stay in L2, for the pooling and the product.
constexpr int64_t kReduceRows = 464;
constexpr int64_t kReduceColumns = 64;  // channels_last, where it is all channels of a position

// Floats or doubles that a call of `reduce` needs.
template <class S>
int64_t reduce_scratch(int64_t C) {
  const int64_t rows = kReduceChannels * kReduceRows, columns = kReduceColumns * C;
  return (rows > columns ? rows : columns) + kLanes<Acc<S>>;
}

// The sum of n values; with COPY into `wide` as well, converted.
template <bool COPY, class S>
BAM_INLINE Acc<S> sum_row(const S* x, int64_t n, Acc<S>* wide) {
  using A = Acc<S>;
  constexpr int W = kLanes<A>;
  Vec<A> s[4] = {zero<A>(), zero<A>(), zero<A>(), zero<A>()};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Vec<A> v = load(x + i + j * W);
      s[j] += v;
      if (COPY) store(wide + i + j * W, v);
    }
  for (; i < n; i += W) {
    const int left = n - i < W ? int(n - i) : W;
    Vec<A> v = left == W ? load(x + i) : load_n(x + i, left);
    s[0] += v;
    if (COPY) store_n(wide + i, v, left);
  }
  return sum<A>((s[0] + s[1]) + (s[2] + s[3]));
}

template <class S>
void reduce_rows(const Reduce<S>& r, int64_t p0, int64_t p1, Acc<S>* pool, Acc<S>* scratch) {
  using A = Acc<S>;
  const bool copy = r.hidden && lines_collide<S>(r.line);
  for (int64_t p = p0; p < p1; p += kReduceRows) {
    const int64_t n = p1 - p < kReduceRows ? p1 - p : kReduceRows;
    for (int64_t c = 0; c < r.channels; c += kReduceChannels) {
      const int64_t some = r.channels - c < kReduceChannels ? r.channels - c : kReduceChannels;
      const S* x = r.x + c * r.line + p;
      for (int64_t i = 0; i < some; ++i) {
        const S* row = x + i * r.line;
        A* wide = scratch + i * kReduceRows;
        if (pool) pool[c + i] += copy ? sum_row<true>(row, n, wide) : sum_row<false>(row, n, wide);
        else if (copy) widen_row<S>(row, wide, n);
      }
      if (!r.hidden) continue;
      Term<A> term{scratch, r.weight + c * r.ld};
      int64_t step = kReduceRows;
      if constexpr (sizeof(S) != 2)
        if (!copy) term.a = x, step = r.line;
      product<A>(
          {n, r.ld / kLanes<A>, &term, 1, some, 1, step, r.ld, r.out + p * r.ld, r.ld, c > 0});
    }
    if (r.hidden && (r.scale || r.shift || r.relu))
      affine(r.out + p * r.ld, r.out + p * r.ld, n, r.ld, r.ld, r.scale, r.shift, r.relu);
  }
}

template <class S>
void reduce_columns(const Reduce<S>& r, int64_t p0, int64_t p1, Acc<S>* pool, Acc<S>* scratch) {
  using A = Acc<S>;
  constexpr int W = kLanes<A>;
  const int64_t C = r.channels;
  for (int64_t p = p0; p < p1; p += kReduceColumns) {
    const int64_t n = p1 - p < kReduceColumns ? p1 - p : kReduceColumns;
    const S* x = r.x + p * r.line;
    if (pool)
      for (int64_t c = 0; c < C; c += W) {
        const int left = C - c < W ? int(C - c) : W;
        auto get = [&](int64_t i) {
          Vec<A> v = left == W ? load(x + i * r.line + c) : load_n(x + i * r.line + c, left);
          if (sizeof(S) == 2) store_n(scratch + i * C + c, v, left);
          return v;
        };
        Vec<A> even = zero<A>(), odd = zero<A>();
        int64_t i = 0;
        for (; i + 2 <= n; i += 2) {
          even += get(i);
          odd += get(i + 1);
        }
        if (i < n) even += get(i);
        store_n(pool + c, load_n(pool + c, left) + (even + odd), left);
      }
    else if (sizeof(S) == 2)
      for (int64_t i = 0; i < n; ++i) widen_row<S>(x + i * r.line, scratch + i * C, C);
    if (!r.hidden) continue;
    const A* rows;
    int64_t row = C;
    if constexpr (sizeof(S) == 2) rows = scratch;
    else rows = x, row = r.line;
    A* out = r.out + p * r.ld;
    for (int64_t c = 0; c < C; c += kReduceChannels) {
      const int64_t some = C - c < kReduceChannels ? C - c : kReduceChannels;
      const Term<A> term{rows + c, r.weight + c * r.ld};
      product<A>({n, r.ld / W, &term, 1, some, row, 1, r.ld, out, r.ld, c > 0});
    }
    if (r.scale || r.shift || r.relu) affine(out, out, n, r.ld, r.ld, r.scale, r.shift, r.relu);
  }
}

// Positions [p0, p1) of one sample. pool [C] is added to, where given.
template <class S>
void reduce(const Reduce<S>& r, int64_t p0, int64_t p1, Acc<S>* pool, Acc<S>* scratch) {
  if (r.channels_last) reduce_columns<S>(r, p0, p1, pool, scratch);
  else reduce_rows<S>(r, p0, p1, pool, scratch);
}

} // namespace BAM_ISA
} // namespace bam
