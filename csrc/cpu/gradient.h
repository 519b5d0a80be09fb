// The gradient of x (through the gate, the reduction and the pooling at once) and of W0.
#pragma once

#include "gate.h"
#include "maps.h"

namespace bam {
namespace BAM_ISA {

// NCHW: so many channels and positions at a time; their sums stay in L1.
constexpr int64_t kGradientChannels = 24, kGradientPositions = 256;
constexpr int64_t kGradientColumns = 24;  // positions at a time, channels_last

// Floats or doubles that a call of input_gradient needs.
template <class A>
int64_t gradient_scratch(int64_t C) {
  const int64_t rows = kGradientChannels * kGradientPositions;
  const int64_t columns = kGradientColumns * (C + kPanel);
  return rows > columns ? rows : columns;
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

// Positions [p0, p1) of one sample, all channels. p0 is a multiple of the vector's width.
template <class S>
void input_gradient(
    const Gate<Acc<S>>& g, const InputGradient<S>& r, int64_t p0, int64_t p1, Acc<S>* scratch) {
  using A = Acc<S>;
  constexpr int W = kLanes<A>;
  const int64_t C = r.channels, step = g.channels_last ? kGradientColumns : kGradientPositions;
  const A* sums = r.dreduced ? scratch : nullptr;
  for (int64_t q = p0; q < p1; q += step) {
    const int64_t n = p1 - q < step ? p1 - q : step;
    if (g.channels_last) {
      const int64_t room = (C + kPanel - 1) / kPanel * kPanel;
      for (int64_t c = 0; r.dreduced && c < C; c += kPanel) {
        const Term<A> term{r.dreduced + q * r.ld, r.weight + c * r.hidden};
        const int64_t vecs = ((C - c < kPanel ? C - c : kPanel) + W - 1) / W;
        product<A>({n, vecs, &term, 1, r.hidden, r.ld, 1, kPanel, scratch + c, room, false});
      }
      gradient_lines<S>(
          g, r.dout, r.dout_line, sums, room, r.dpooled, r.dx, r.dx_line, q, n, 0, C);
    } else {
      for (int64_t c = 0; c < C; c += kGradientChannels) {
        const int64_t count = C - c < kGradientChannels ? C - c : kGradientChannels;
        if (r.dreduced) {
          const Term<A> term{r.weight + c * r.hidden, r.dreduced + q};
          product<A>(
              {count, (n + W - 1) / W, &term, 1, r.hidden, r.hidden, 1, r.ld, scratch, step, false});
        }
        gradient_lines<S>(
            g, r.dout, r.dout_line, sums, step, r.dpooled, r.dx, r.dx_line, c, count, q, n);
      }
    }
  }
}

// At a time: with kWeightChannels of x and dreduced of 64 channels they fit L1.
constexpr int64_t kWeightPositions = 64;

// Floats or doubles that a call of weight_gradient needs: a block of x, in lines of either axis.
template <class A>
int64_t weight_gradient_scratch() {
  constexpr int64_t lines = kWeightChannels > kWeightPositions ? kWeightChannels : kWeightPositions;
  return kWeightChannels * kWeightPositions + lines * kLanes<A>;
}

// Channels [c0, c1) of dw [C][ld], at most kWeightChannels of them, over all samples.
template <class S>
void weight_gradient(
    const WeightGradient<S>& r, int64_t c0, int64_t c1, Acc<S>* dw, Acc<S>* scratch) {
  using A = Acc<S>;
  const int64_t count = c1 - c0, some = kWeightPositions;
  for (int64_t n = 0; n < r.samples; ++n)
    for (int64_t p = 0; p < r.positions; p += some) {
      const int64_t length = r.positions - p < some ? r.positions - p : some;
      const S* x = r.x + n * r.sample + (r.channels_last ? p * r.line + c0 : c0 * r.line + p);
      Term<A> term{scratch, r.dreduced + (n * r.positions + p) * r.ld};
      int64_t line = r.line;
      if (lines_collide<S>(r.line)) {
        const int64_t lines = r.channels_last ? length : count;
        const int64_t values = r.channels_last ? count : length;
        line = values + kLanes<A>;
        for (int64_t i = 0; i < lines; ++i) widen_row<S>(x + i * r.line, scratch + i * line, values);
      } else if constexpr (sizeof(S) != 2) {
        term.a = x;
      }
      product<A>(
          {count, r.ld / kLanes<A>, &term, 1, length, r.channels_last ? 1 : line,
           r.channels_last ? line : 1, r.ld, dw + c0 * r.ld, r.ld, n > 0 || p > 0});
    }
}

} // namespace BAM_ISA
} // namespace bam
