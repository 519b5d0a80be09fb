// The gradient of x (through the gate, the reduction and the pooling at once) and of W0.
#pragma once

#include "gate.h"

namespace bam {
namespace BAM_ISA {

constexpr int64_t kGradientPositions = 512; // NCHW: 8 rows of x are 16 KiB, 16 of dreduced 32 KiB
constexpr int64_t kGradientColumns = 32;    // channels_last; x of 256 channels is 32 KiB

template <class A>
int64_t gradient_scratch(int64_t C) {
  const int64_t rows = kRows * kGradientPositions, columns = kGradientColumns * C;
  return 2 * (rows > columns ? rows : columns) + kLanes<A>;
}

// One line along the dense axis: dx = sums + across + along + dout * (M + residual).
template <Map MAP, bool LINE_IS_CHANNEL, class S, class A = Acc<S>>
BAM_INLINE void gradient_line(
    const S* dout, const A* sums, A across, const A* along, A fixed, const A* line, bool residual,
    S* dx, int64_t n) {
  constexpr int W = kLanes<A>;
  constexpr bool kNeedsLine = LINE_IS_CHANNEL ? MAP != Map::spatial : MAP != Map::channel;
  const Vec<A> f = splat<A>(fixed);
  for (int64_t i = 0; i < n; i += W) {
    const int lanes = n - i < W ? int(n - i) : W;
    auto get = [&](auto* p) { return lanes == W ? load(p + i) : load_n(p + i, lanes); };
    Vec<A> y = splat<A>(across);
    if (sums) y += get(sums);
    if (along) y += get(along);
    if (dout) {
      Vec<A> d = get(dout), l = kNeedsLine ? get(line) : f;
      Vec<A> m = LINE_IS_CHANNEL ? attention<MAP, A>(l, f) : attention<MAP, A>(f, l);
      y += residual ? d + d * m : d * m;
    }
    if (lanes == W) store(dx + i, y);
    else store_n(dx + i, y, lanes);
  }
}

template <class S, class A = Acc<S>>
void gradient_lines(
    const Gate<A>& g, const S* dout, int64_t dout_stride, const A* sums, int64_t ld,
    const A* dpooled, S* dx, int64_t dx_stride, int64_t line0, int64_t lines, int64_t i0,
    int64_t n) {
  with_map(g.map, [&](auto map) {
    constexpr Map MAP = decltype(map)::value;
    for (int64_t l = 0; l < lines; ++l) {
      const S* d = dout ? dout + (line0 + l) * dout_stride + i0 : nullptr;
      const A* s = sums ? sums + l * ld : nullptr;
      S* to = dx + (line0 + l) * dx_stride + i0;
      if (g.channels_last) {
        const A fixed = dout && MAP != Map::channel ? g.by_position[line0 + l] : A(0);
        gradient_line<MAP, true, S>(
            d, s, A(0), dpooled ? dpooled + i0 : nullptr, fixed,
            g.by_channel ? g.by_channel + i0 : nullptr, g.residual, to, n);
      } else {
        const A fixed = dout && MAP != Map::spatial ? g.by_channel[line0 + l] : A(0);
        gradient_line<MAP, false, S>(
            d, s, dpooled ? dpooled[line0 + l] : A(0), static_cast<const A*>(nullptr), fixed,
            g.by_position ? g.by_position + i0 : nullptr, g.residual, to, n);
      }
    }
  });
}

// Positions [p0, p1) of one sample, all channels.
template <class S>
void input_gradient(
    const Gate<Acc<S>>& g, const S* dout, int64_t dout_stride, const S* x, int64_t x_stride, S* dx,
    int64_t dx_stride, const Acc<S>* dpooled, const Acc<S>* dreduced, int64_t ld, const Acc<S>* w,
    Acc<S>* dw, int64_t C, int64_t h, int64_t p0, int64_t p1, Acc<S>* scratch) {
  using A = Acc<S>;
  A* converted = scratch + gradient_scratch<A>(C) / 2;
  const int64_t step = g.channels_last ? kGradientColumns : kGradientPositions;
  for (int64_t q = p0; q < p1; q += step) {
    const int64_t n = p1 - q < step ? p1 - q : step;
    if (g.channels_last) {
      if (dx) {
        if (dreduced) outer<A>(n, C, h, dreduced + q, 1, ld, w, C, scratch, C, false);
        gradient_lines<S>(
            g, dout, dout_stride, dreduced ? scratch : nullptr, C, dpooled, dx, dx_stride, q, n, 0,
            C);
      }
      if (dw) {
        int64_t x_ld = C;
        const A* rows = wide_rows(x + q * x_stride, x_stride, n, C, converted, x_ld);
        outer<A>(h, C, n, dreduced + q, ld, 1, rows, x_ld, dw, C, true);
      }
    } else {
      for (int64_t c = 0; c < C; c += kRows) {
        const int64_t count = C - c < kRows ? C - c : kRows;
        if (dx) {
          if (dreduced) outer<A>(count, n, h, w + c, 1, C, dreduced + q, ld, scratch, step, false);
          gradient_lines<S>(
              g, dout, dout_stride, dreduced ? scratch : nullptr, step, dpooled, dx, dx_stride, c,
              count, q, n);
        }
        if (dw) {
          int64_t x_ld = step;
          const A* rows = wide_rows(x + c * x_stride + q, x_stride, count, n, converted, x_ld);
          inner<A>(h, count, n, dreduced + q, ld, rows, x_ld, dw + c, C, 1, true);
        }
      }
    }
  }
}

} // namespace BAM_ISA
} // namespace bam
