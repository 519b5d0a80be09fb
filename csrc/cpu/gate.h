// The gate (Eq. 1-2) and the gradients of its logits.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace bam {
namespace BAM_ISA {

template <Map MAP, class A>
BAM_INLINE Vec<A> attention(Vec<A> a, Vec<A> b) {
  if constexpr (MAP == Map::factored) return reciprocal<A>(splat(A(1)) + a * b);
  else if constexpr (MAP == Map::sum) return sigmoid<A>(a + b);
  else if constexpr (MAP == Map::product) return sigmoid<A>(a * b);
  else if constexpr (MAP == Map::maximum) return maximum<A>(a, b);
  else if constexpr (MAP == Map::sigmoid_sum) return a + b;
  else if constexpr (MAP == Map::channel) return a;
  else return b;
}

// Calls f with the map as a constant.
template <class F>
BAM_INLINE void with_map(Map map, F&& f) {
  switch (map) {
    case Map::factored: return f(std::integral_constant<Map, Map::factored>{});
    case Map::sum: return f(std::integral_constant<Map, Map::sum>{});
    case Map::product: return f(std::integral_constant<Map, Map::product>{});
    case Map::maximum: return f(std::integral_constant<Map, Map::maximum>{});
    case Map::sigmoid_sum: return f(std::integral_constant<Map, Map::sigmoid_sum>{});
    case Map::channel: return f(std::integral_constant<Map, Map::channel>{});
    case Map::spatial: return f(std::integral_constant<Map, Map::spatial>{});
  }
}

// One line along the dense axis; `line` is that axis' vector, `fixed` the other's one value.
template <Map MAP, bool RESIDUAL, bool LINE_IS_CHANNEL, class S, class A>
BAM_INLINE void gate_line(const S* x, S* out, A fixed, const A* line, int64_t begin, int64_t end) {
  constexpr int W = kLanes<A>;
  constexpr bool kNeedsLine = LINE_IS_CHANNEL ? MAP != Map::spatial : MAP != Map::channel;
  const Vec<A> f = splat<A>(fixed);
  auto one = [&](Vec<A> v, Vec<A> l) {
    Vec<A> m = LINE_IS_CHANNEL ? attention<MAP, A>(l, f) : attention<MAP, A>(f, l);
    return RESIDUAL ? v + v * m : v * m;
  };
  int64_t i = begin;
  for (; i + 2 * W <= end; i += 2 * W) {
    Vec<A> l0 = kNeedsLine ? load(line + i) : f, l1 = kNeedsLine ? load(line + i + W) : f;
    Vec<A> y0 = one(load(x + i), l0), y1 = one(load(x + i + W), l1);
    store(out + i, y0);
    store(out + i + W, y1);
  }
  for (; i < end; i += W) {
    const int n = int(end - i < W ? end - i : W);
    store_n(out + i, one(load_n(x + i, n), kNeedsLine ? load_n(line + i, n) : f), n);
  }
}

template <class S>
void gate(
    const Gate<Acc<S>>& g, const S* x, int64_t x_stride, S* out, int64_t out_stride, int64_t c0,
    int64_t c1, int64_t p0, int64_t p1) {
  with_map(g.map, [&](auto map) {
    constexpr Map MAP = decltype(map)::value;
    auto walk = [&](auto residual) {
      constexpr bool RES = decltype(residual)::value;
      if (g.channels_last) {
        for (int64_t p = p0; p < p1; ++p)
          gate_line<MAP, RES, true>(
              x + p * x_stride, out + p * out_stride,
              MAP == Map::channel ? Acc<S>(0) : g.by_position[p], g.by_channel, c0, c1);
      } else {
        for (int64_t c = c0; c < c1; ++c)
          gate_line<MAP, RES, false>(
              x + c * x_stride, out + c * out_stride,
              MAP == Map::spatial ? Acc<S>(0) : g.by_channel[c], g.by_position, p0, p1);
      }
    };
    if (g.residual) walk(std::true_type{});
    else walk(std::false_type{});
  });
}

// What of grad = dout * x goes to the channel's and to the position's logit.
enum class Share { factored, both, channel_only, spatial_only, product, maximum, sigmoid_sum };

template <Share SHARE, class A>
BAM_INLINE void shares(Vec<A> grad, Vec<A> c, Vec<A> s, Vec<A>& to_c, Vec<A>& to_s) {
  const Vec<A> one = splat(A(1));
  if constexpr (SHARE == Share::sigmoid_sum) {  // c and s are sigmoid'(logit)
    to_c = grad * c, to_s = grad * s;
  } else if constexpr (SHARE == Share::factored) {  // c and s are exp(-logit), as in Map::factored
    Vec<A> e = c * s, m = reciprocal<A>(one + e);
    to_c = to_s = grad * (m * (m * e));
  } else {
    Vec<A> z = SHARE == Share::both ? c + s
        : SHARE == Share::product   ? c * s
        : SHARE == Share::maximum   ? maximum<A>(c, s)
        : SHARE == Share::channel_only ? c
                                       : s;
    Vec<A> m = sigmoid<A>(z);
    Vec<A> v = grad * (m * (one - m));
    to_c = to_s = v;
    if constexpr (SHARE == Share::product) to_c = v * s, to_s = v * c;
    if constexpr (SHARE == Share::maximum) {  // ties share, as torch.maximum's gradient does
      Vec<A> half = (c == s) ? v * splat(A(0.5)) : v;
      to_c = (c < s) ? zero<A>() : half;
      to_s = (s < c) ? zero<A>() : half;
    }
  }
}

template <Share SHARE, class S, class A = Acc<S>>
void gate_gradient_lines(
    bool channels_last, const S* dout, int64_t dout_stride, const S* x, int64_t x_stride,
    const A* channel, const A* spatial, A* dchannel, A* dspatial, int64_t c0, int64_t c1,
    int64_t p0, int64_t p1) {
  constexpr int W = kLanes<A>;
  constexpr bool kHasC = SHARE != Share::spatial_only, kHasS = SHARE != Share::channel_only;
  // `lines` go over the axis that is not dense; along the line its vector is read and added to.
  const int64_t l0 = channels_last ? p0 : c0, l1 = channels_last ? p1 : c1;
  const int64_t i0 = channels_last ? c0 : p0, i1 = channels_last ? c1 : p1;
  for (int64_t line = l0; line < l1; ++line) {
    const S* d = dout + line * dout_stride;
    const S* v = x + line * x_stride;
    Vec<A> total = zero<A>();
    auto step = [&](int64_t i, int n, auto whole) {
      constexpr bool WHOLE = decltype(whole)::value;
      auto get = [&](auto* p) { return WHOLE ? load(p) : load_n(p, n); };
      Vec<A> grad = get(d + i) * get(v + i), to_c, to_s;
      Vec<A> c = zero<A>(), s = zero<A>();
      if (channels_last) {
        if constexpr (kHasC) c = get(channel + i);
        if constexpr (kHasS) s = splat<A>(spatial[line]);
      } else {
        if constexpr (kHasC) c = splat<A>(channel[line]);
        if constexpr (kHasS) s = get(spatial + i);
      }
      shares<SHARE, A>(grad, c, s, to_c, to_s);
      A* along = channels_last ? dchannel : dspatial;
      Vec<A> mine = channels_last ? to_s : to_c, others = channels_last ? to_c : to_s;
      if constexpr (!WHOLE) {  // lanes behind the end hold 0 * sigmoid'(0), or NaN of an infinity
        for (int k = n; k < W; ++k) mine[k] = 0;
      }
      total += mine;
      if (along) {
        if constexpr (WHOLE) store(along + i, load(along + i) + others);
        else store_n(along + i, load_n(along + i, n) + others, n);
      }
    };
    int64_t i = i0;
    for (; i + W <= i1; i += W) step(i, W, std::true_type{});
    if (i < i1) step(i, int(i1 - i), std::false_type{});
    A* across = channels_last ? dspatial : dchannel;
    if (across) across[line] += sum<A>(total);
  }
}

template <class S>
void gate_gradient(
    Combine combine, bool has_channel, bool has_spatial, bool factored, bool channels_last,
    const S* dout, int64_t dout_stride, const S* x, int64_t x_stride, const Acc<S>* channel,
    const Acc<S>* spatial, Acc<S>* dchannel, Acc<S>* dspatial, int64_t c0, int64_t c1, int64_t p0,
    int64_t p1) {
  auto run = [&](auto share) {
    gate_gradient_lines<decltype(share)::value, S>(
        channels_last, dout, dout_stride, x, x_stride, channel, spatial, dchannel, dspatial, c0,
        c1, p0, p1);
  };
  if (!has_spatial) run(std::integral_constant<Share, Share::channel_only>{});
  else if (!has_channel) run(std::integral_constant<Share, Share::spatial_only>{});
  else if (factored) run(std::integral_constant<Share, Share::factored>{});
  else if (combine == Combine::sum) run(std::integral_constant<Share, Share::both>{});
  else if (combine == Combine::product) run(std::integral_constant<Share, Share::product>{});
  else if (combine == Combine::maximum) run(std::integral_constant<Share, Share::maximum>{});
  else run(std::integral_constant<Share, Share::sigmoid_sum>{});
}

} // namespace BAM_ISA
} // namespace bam
