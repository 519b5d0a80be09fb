// The spatial branch of one sample in inference, up to its logits, on hidden maps of either kind; each
// step in parts that threads share out.
#pragma once

#include <algorithm>

#include "launch.h"

namespace bam {

template <class S>
struct Linear {
  using A = AccOf<S>;
  const S* stored;  // the weight as it is, or null:
  const A* weight;  // then in the accumulator's type
  Affine<A> affine;
  int64_t outs, ins;
};

template <class S>
struct Module {
  using A = AccOf<S>;
  Combine combine;
  bool residual, has_channel, has_spatial;
  std::vector<Linear<S>> mlp;
  const A* reduce = nullptr;
  Affine<A> reduce_affine;
  std::vector<const A*> convs;
  std::vector<Affine<A>> conv_affines;
  const A* project = nullptr;
  A final_scale = 1, final_shift = 0;
  int64_t hidden = 0, ld = 0, dilation = 1, widest = 0;  // ld: the hidden width as maps have it
  bool by_output = false;  // whether threads that share a sample share out a convolution's outputs
  // In place of the vectors' weights, where matrix units run.
  const Amx* amx = nullptr;
  const bf16* tiled_reduce = nullptr;
  std::vector<const bf16*> tiled_convs;
};

// What both kinds are made for.
template <class S>
struct Sample {
  const Module<S>& m;
  const View& v;
  const S* x;
  int64_t parts;
  bool threads;
  // In NCHW threads share out the channels of the reduction, where there are enough of them: what a
  // thread has read of x is then what it gates, and each has its part of the sums.
  bool by_channel;
};

// Maps [P][ld] in the accumulator's type, on vectors.
template <class S>
class VectorMaps {
 public:
  using A = AccOf<S>;
  VectorMaps(const Sample<S>& sample, Arena& arena) : s_(sample), size_(sample.v.p * sample.m.ld) {
    if (s_.m.has_spatial) maps_[0] = arena.take<A>(s_.by_channel ? s_.parts * size_ : size_);
    if (!s_.m.convs.empty()) maps_[1] = arena.take<A>(size_);
    by_output_ = s_.m.by_output && s_.threads;
    sums_ = by_output_ ? s_.parts : 1;
    if (s_.m.has_spatial) logits_ = arena.zeros<A>(sums_ * s_.v.p);
  }

  // Part i of pooling, whose sums [C] are added to `pool` where given, and of the reduction.
  void reduce(int64_t i, A* pool) {
    const Module<S>& m = s_.m;
    const View& v = s_.v;
    const Kernels<S>& k = kernels<S>();
    Arena own;
    A* scratch = own.take<A>(k.reduce_scratch(v.c));
    const Affine<A>& affine = m.reduce_affine;
    Reduce<S> r{s_.x, v.line, v.channels_last, v.c, m.hidden, m.reduce, m.ld, maps_[0],
                affine.scale, affine.shift, true};
    if (!s_.by_channel) {
      k.reduce(r, part(i, s_.parts, v.p), part(i + 1, s_.parts, v.p), pool, scratch);
      return;
    }
    const int64_t c0 = part(i, s_.parts, v.c), c1 = part(i + 1, s_.parts, v.c);
    r.x += c0 * v.line, r.channels = c1 - c0;
    if (m.has_spatial) r.weight += c0 * m.ld, r.out += i * size_;
    r.scale = r.shift = nullptr, r.relu = false;
    k.reduce(r, 0, v.p, pool ? pool + c0 : nullptr, scratch);
  }

  // Parts [begin, end) of what follows it, where that takes the sums of all.
  bool joins() const { return s_.by_channel && s_.m.has_spatial; }
  void join(int64_t begin, int64_t end) {
    const WideKernels<A>& wide = wide_kernels<A>();
    const int64_t ld = s_.m.ld, p0 = part(begin, s_.parts, s_.v.p);
    const int64_t n = part(end, s_.parts, s_.v.p) - p0;
    A* sum = maps_[0] + p0 * ld;
    for (int64_t i = 1; i < s_.parts; ++i) wide.add(sum, sum + i * size_, n * ld);
    wide.activate(sum, sum, n, ld, s_.m.reduce_affine.scale, s_.m.reduce_affine.shift);
  }

  // Parts [begin, end) of a convolution.
  void conv(size_t i, int64_t begin, int64_t end) {
    const Module<S>& m = s_.m;
    const View& v = s_.v;
    const WideKernels<A>& wide = wide_kernels<A>();
    const Conv<A> conv{
        maps_[i % 2], maps_[1 - i % 2], m.convs[i], m.conv_affines[i].scale,
        m.conv_affines[i].shift, true, nullptr, v.h, v.w, m.dilation, m.hidden, m.ld,
        i + 1 == m.convs.size() ? m.project : nullptr,
        logits_ + (by_output_ ? begin * v.p : 0)};
    const int64_t vecs = m.ld / wide.lanes, parts = s_.parts;
    if (by_output_) wide.conv(conv, 0, v.h, part(begin, parts, vecs), part(end, parts, vecs));
    else wide.conv(conv, part(begin, parts, v.h), part(end, parts, v.h), 0, vecs);
  }

  // [P], in front of the last norm.
  A* logits() {
    const bool bare = s_.m.convs.empty();
    if (bare)
      wide_kernels<A>().project(maps_[0], s_.v.p, s_.m.ld, s_.m.hidden, s_.m.project, logits_);
    for (int64_t i = 1; !bare && i < sums_; ++i)
      for (int64_t p = 0; p < s_.v.p; ++p) logits_[p] += logits_[i * s_.v.p + p];
    return logits_;
  }

 private:
  const Sample<S> s_;
  const int64_t size_;
  A* maps_[2] = {nullptr, nullptr};
  bool by_output_ = false;
  int64_t sums_ = 1;
  A* logits_ = nullptr;
};

// Maps in bfloat16, on matrix units.
class TileMaps {
 public:
  TileMaps(const Sample<bf16>& sample, Arena& arena)
      : s_(sample), map_(sample.v.h, sample.v.w, sample.m.dilation, sample.m.ld) {
    tiles_ = (s_.v.p + kTile - 1) / kTile;
    size_ = tiles_ * map_.channels / kTile * kTileSums;
    if (!s_.v.channels_last) tile_sums_ = arena.take<float>(s_.by_channel ? s_.parts * size_ : size_);
    for (bf16*& map : maps_) map = arena.zeros<bf16>(map_.size());
    logits_ = arena.take<float>(s_.v.p);
  }

  void reduce(int64_t i, float* pool) {
    const View& v = s_.v;
    const Amx& k = *s_.m.amx;
    Arena own;
    bf16* scratch = own.take<bf16>(k.reduce_scratch(v.c));
    AmxReduce r{s_.x, v.line, v.c, s_.m.tiled_reduce};
    if (v.channels_last) {
      const int64_t p0 = part(i, s_.parts, tiles_) * kTile;
      const int64_t p1 = std::min(v.p, part(i + 1, s_.parts, tiles_) * kTile);
      k.reduce_columns(r, map_, after(s_.m.reduce_affine), p0, p1, maps_[0], pool, scratch);
    } else if (s_.by_channel) {
      const int64_t depths = (v.c + kTileDepth - 1) / kTileDepth;
      const int64_t c0 = part(i, s_.parts, depths) * kTileDepth;
      const int64_t c1 = std::min(v.c, part(i + 1, s_.parts, depths) * kTileDepth);
      r.x += c0 * v.line, r.channels = c1 - c0, r.weight += c0 * map_.channels;
      k.reduce_rows(r, map_, 0, v.p, tile_sums_ + i * size_, pool ? pool + c0 : nullptr, scratch);
    } else {
      const int64_t t0 = part(i, s_.parts, tiles_), t1 = part(i + 1, s_.parts, tiles_);
      const int64_t p1 = std::min(v.p, t1 * kTile);
      k.reduce_rows(r, map_, t0 * kTile, p1, tile_sums_, pool, scratch);
      if (!s_.threads) join(i, i + 1);
    }
  }

  bool joins() const { return !s_.v.channels_last && s_.threads; }
  void join(int64_t begin, int64_t end) {
    s_.m.amx->finish(
        tile_sums_, s_.by_channel ? s_.parts : 1, size_, map_, after(s_.m.reduce_affine),
        part(begin, s_.parts, tiles_), part(end, s_.parts, tiles_), maps_[0]);
  }

  void conv(size_t i, int64_t begin, int64_t end) {
    const bool last = i + 1 == s_.m.tiled_convs.size();
    const AmxConv conv{
        maps_[i % 2], last ? nullptr : maps_[1 - i % 2], s_.m.tiled_convs[i], s_.m.dilation,
        last ? s_.m.project : nullptr, logits_};
    s_.m.amx->conv(
        conv, map_, after(s_.m.conv_affines[i]), part(begin, s_.parts, s_.v.h),
        part(end, s_.parts, s_.v.h));
  }

  float* logits() { return logits_; }

 private:
  AmxFinish after(const Affine<float>& affine) const {
    return {affine.scale, affine.shift, true, s_.m.hidden};
  }

  const Sample<bf16> s_;
  const AmxMap map_;
  int64_t tiles_, size_;
  float* tile_sums_ = nullptr;
  bf16* maps_[2];
  float* logits_;
};

} // namespace bam
