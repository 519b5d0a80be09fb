// Average pool and 1x1 reduction (heads of Eq. 3 and 4) from one read of x.
#pragma once

#include "kernels.h"
#include "micro.h"

namespace bam {
namespace BAM_ISA {

constexpr int64_t kReduceChannels = 64;  // at a time: 12 KiB of x stay in L1 for all rows of w
constexpr int64_t kReducePositions = 16; // channels_last; x of 256 channels is 16 KiB

// Floats or doubles that a call of reduce_rows or reduce_columns needs.
template <class A>
int64_t reduce_scratch(int64_t C, int64_t h) {
  constexpr int64_t tile = kVecs * kLanes<A>;
  const int64_t rows = h * tile + kReduceChannels * tile;
  const int64_t columns = h * kReducePositions + C * kReducePositions;
  return (rows > columns ? rows : columns) + kLanes<A>;
}

// Where a tile of the reduction, [h][n] from position p on, goes. It may be changed.
template <class S>
void sink(const ReduceOutput<Acc<S>>& out, int64_t h, int64_t p, int64_t n, Acc<S>* tile, int64_t ld) {
  using A = Acc<S>;
  constexpr int W = kLanes<A>;
  for (int64_t j = 0; j < h; ++j) {
    A* t = tile + j * ld;
    if (out.scale || out.shift || out.relu) {
      const Vec<A> scale = splat<A>(out.scale ? out.scale[j] : A(1));
      const Vec<A> shift = splat<A>(out.shift ? out.shift[j] : A(0));
      for (int64_t i = 0; i < n; i += W) {
        const int lanes = n - i < W ? int(n - i) : W;
        Vec<A> y = load_n(t + i, lanes) * scale + shift;
        store_n(t + i, out.relu ? relu<A>(y) : y, lanes);
      }
    }
    if (out.planes) {  // row segment by row segment
      const Planes& g = *out.geometry;
      A* plane = out.planes + j * g.plane + g.origin;
      int64_t row = p / g.width, column = p % g.width;
      for (int64_t done = 0; done < n; column = 0, ++row) {
        const int64_t count = g.width - column < n - done ? g.width - column : n - done;
        for (int64_t i = 0; i < count; i += W) {
          const int lanes = count - i < W ? int(count - i) : W;
          store_n(plane + row * g.pitch + column + i, load_n(t + done + i, lanes), lanes);
        }
        done += count;
      }
    } else {
      S* dense = static_cast<S*>(out.dense);
      if (out.dense_row == 1 && out.dense_column != 1) {  // channels_last
        for (int64_t i = 0; i < n; ++i) store_one(dense + (p + i) * out.dense_column + j, t[i]);
      } else {
        S* to = dense + j * out.dense_row + p;
        for (int64_t i = 0; i < n; i += W) {
          const int lanes = n - i < W ? int(n - i) : W;
          store_n(to + i, load_n(t + i, lanes), lanes);
        }
      }
    }
  }
}

// NCHW: positions [p0, p1) of one sample. pool [C][lanes] is added to, where given.
template <class S>
void reduce_rows(
    const S* x, int64_t stride, int64_t C, int64_t p0, int64_t p1, const Acc<S>* w, int64_t h,
    const ReduceOutput<Acc<S>>& out, Acc<S>* pool, Acc<S>* scratch) {
  using A = Acc<S>;
  constexpr int W = kLanes<A>;
  constexpr int64_t kTile = kVecs * W;
  A* sums = scratch;
  A* converted = scratch + h * kTile;
  for (int64_t p = p0; p < p1; p += kTile) {
    const int64_t n = p1 - p < kTile ? p1 - p : kTile;
    for (int64_t c = 0; c < C; c += kReduceChannels) {
      const int64_t count = C - c < kReduceChannels ? C - c : kReduceChannels;
      int64_t ld = kTile;
      const A* block = wide_rows(x + c * stride + p, stride, count, n, converted, ld);
      if (pool) {
        for (int64_t i = 0; i < count; ++i) {
          const A* line = block + i * ld;
          Vec<A> s = load(pool + (c + i) * W);
          if (n == kTile) {
            for (int v = 0; v < kVecs; ++v) s += load(line + v * W);
          } else {
            for (int64_t k = 0; k < n; k += W) s += load_n(line + k, n - k < W ? int(n - k) : W);
          }
          store(pool + (c + i) * W, s);
        }
      }
      if (h && out.packed)
        outer_packed<A>(h, n, count, w, C, c, block, ld, sums, kTile, c > 0);
      else if (h)
        outer<A>(h, n, count, w + c, C, 1, block, ld, sums, kTile, c > 0);
    }
    if (h) sink<S>(out, h, p, n, sums, kTile);
  }
}

// channels_last: the same, of x [P][C]; here pool has one value a channel.
template <class S>
void reduce_columns(
    const S* x, int64_t stride, int64_t C, int64_t p0, int64_t p1, const Acc<S>* w, int64_t h,
    const ReduceOutput<Acc<S>>& out, Acc<S>* pool, Acc<S>* scratch) {
  using A = Acc<S>;
  constexpr int W = kLanes<A>;
  A* sums = scratch;
  A* converted = scratch + h * kReducePositions;
  for (int64_t p = p0; p < p1; p += kReducePositions) {
    const int64_t n = p1 - p < kReducePositions ? p1 - p : kReducePositions;
    int64_t ld = C;
    const A* rows = wide_rows(x + p * stride, stride, n, C, converted, ld);
    if (pool) {
      for (int64_t c = 0; c < C; c += W) {
        const int lanes = C - c < W ? int(C - c) : W;
        Vec<A> s = load_n(pool + c, lanes);
        if (lanes == W)
          for (int64_t i = 0; i < n; ++i) s += load(rows + i * ld + c);
        else
          for (int64_t i = 0; i < n; ++i) s += load_n(rows + i * ld + c, lanes);
        store_n(pool + c, s, lanes);
      }
    }
    if (!h) continue;
    inner<A>(h, n, C, w, C, rows, ld, sums, kReducePositions, 1, false);
    sink<S>(out, h, p, n, sums, kReducePositions);
  }
}

} // namespace BAM_ISA
} // namespace bam
