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
  return (rows > columns ? rows : columns) + kLanes<A>;
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
    const Gate<Acc<S>>& g, const S* dout, int64_t dout_stride, S* dx, int64_t dx_stride,
    const Acc<S>* dpooled, const Acc<S>* dreduced, int64_t ld, const Acc<S>* w, int64_t C,
    int64_t h, int64_t p0, int64_t p1, Acc<S>* scratch) {
  using A = Acc<S>;
  const int64_t step = g.channels_last ? kGradientColumns : kGradientPositions;
  const A* sums = dreduced ? scratch : nullptr;
  for (int64_t q = p0; q < p1; q += step) {
    const int64_t n = p1 - q < step ? p1 - q : step;
    if (g.channels_last) {
      if (dreduced) outer<A>(n, C, h, dreduced + q, 1, ld, w, C, scratch, C, false);
      gradient_lines<S>(g, dout, dout_stride, sums, C, dpooled, dx, dx_stride, q, n, 0, C);
    } else {
      for (int64_t c = 0; c < C; c += kRows) {
        const int64_t count = C - c < kRows ? C - c : kRows;
        if (dreduced) outer<A>(count, n, h, w + c, 1, C, dreduced + q, ld, scratch, step, false);
        gradient_lines<S>(
            g, dout, dout_stride, sums, step, dpooled, dx, dx_stride, c, count, q, n);
      }
    }
  }
}

constexpr int64_t kWeightPositions = 1536; // of all samples at a time: 4 rows of x are 24 KiB

// Floats or doubles that a call of weight_gradient needs: x of a block of channels, converted.
template <class S>
int64_t weight_gradient_scratch(int64_t N, int64_t P) {
  return sizeof(S) == 2 ? kWeightChannels * N * P + kLanes<Acc<S>> : 0;
}

// Channels [c0, c1) of dw, at most kWeightChannels of them, over all samples.
template <class S>
void weight_gradient(
    bool channels_last, const S* x, int64_t x_sample, int64_t x_stride, const Acc<S>* dreduced,
    Acc<S>* dw, int64_t N, int64_t C, int64_t h, int64_t P, int64_t c0, int64_t c1,
    Acc<S>* scratch) {
  using A = Acc<S>;
  const int64_t count = c1 - c0;
  int64_t ld = channels_last ? count : P, sample = count * P;
  const A* rows = nullptr;
  for (int64_t n = 0; n < N; ++n) {
    const S* from = x + n * x_sample + (channels_last ? c0 : c0 * x_stride);
    A* room = sizeof(S) == 2 ? scratch + n * sample : nullptr;
    const A* wide = channels_last ? wide_rows(from, x_stride, P, count, room, ld)
                                  : wide_rows(from, x_stride, count, P, room, ld);
    if (n == 0) rows = wide;
  }
  if (sizeof(S) != 2) sample = x_sample;
  if (channels_last) {
    for (int64_t n = 0; n < N; ++n)
      outer<A>(
          h, count, P, dreduced + n * h * P, P, 1, rows + n * sample, ld, dw + c0, C, n > 0);
    return;
  }
  const int64_t some = kWeightPositions / N / 16 * 16, step = some > 64 ? some : 64;
  for (int64_t p = 0; p < P; p += step) {
    const int64_t length = P - p < step ? P - p : step;
    inner_several<A>(
        count, h, length, rows + p, ld, dreduced + p, P, {N, sample, h * P}, dw + c0, 1, C, p > 0);
  }
}

} // namespace BAM_ISA
} // namespace bam
