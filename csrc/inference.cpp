// A whole module in inference: batch norms with known statistics, one read of x for pooling and
// reduction, and one for the gate.
#include <cmath>
#include <cstring>

#include "hidden_maps.h"
#include "operators.h"

namespace bam {

namespace {

// The parameters in the order in which the operator has them.
class Reader {
 public:
  Reader(const std::vector<Tensor>& tensors, const std::vector<double>& eps)
      : tensors_(tensors), eps_(eps) {}
  const Tensor& next() {
    STD_TORCH_CHECK(
        tensor_ < tensors_.size(), "params: expected more than ", tensors_.size(), " tensors");
    return tensors_[tensor_++];
  }
  double next_eps() {
    STD_TORCH_CHECK(
        eps_at_ < eps_.size(), "eps: expected more than ", eps_.size(), " numbers");
    return eps_[eps_at_++];
  }
  void finish() const {
    STD_TORCH_CHECK(
        tensor_ == tensors_.size(), "params: expected ", tensor_, " tensors, got ", tensors_.size());
    STD_TORCH_CHECK(eps_at_ == eps_.size(), "eps: expected ", eps_at_, " numbers, got ", eps_.size());
  }

 private:
  const std::vector<Tensor>& tensors_;
  const std::vector<double>& eps_;
  size_t tensor_ = 0, eps_at_ = 0;
};

template <class A>
Affine<A> folded(
    const A* bias, const A* gamma, const A* beta, const A* mean, const A* var, double eps,
    int64_t n, int64_t ld, Arena& arena) {
  A* scale = arena.zeros<A>(ld);
  A* shift = arena.zeros<A>(ld);
  for (int64_t i = 0; i < n; ++i) {
    scale[i] = A(1) / std::sqrt(var[i] + A(eps)) * (gamma ? gamma[i] : A(1));
    shift[i] = (beta ? beta[i] : A(0)) + ((bias ? bias[i] : A(0)) - mean[i]) * scale[i];
  }
  return {scale, shift};
}

template <class A>
Affine<A> read_norm(
    Reader& r, const char* name, bool exists, const A* bias, int64_t n, int64_t ld, Arena& arena) {
  if (!exists) return {nullptr, padded(bias, n, ld, arena)};
  const A* v[4];
  for (const A*& each : v) each = values<A>(r.next(), name, {n}, arena);
  STD_TORCH_CHECK(v[2] && v[3], name, ": expected running statistics, got none");
  return folded(bias, v[0], v[1], v[2], v[3], r.next_eps(), n, ld, arena);
}

// What cannot be absent.
template <class T>
const T* required(const T* p, const char* name, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(
      p != nullptr, name, ": expected shape ", shape_text(shape.begin(), int64_t(shape.size())),
      ", got a tensor without elements");
  return p;
}
template <class A>
const A* required(
    const Tensor& t, const char* name, std::initializer_list<int64_t> shape, Arena& arena) {
  return required(values<A>(t, name, shape, arena), name, shape);
}

const char* const kReduce = "spatial.reduce";
const char* const kConv = "spatial.dilated";
// The least hidden width for matrix units: below, half of a tile and more would be padding.
constexpr int64_t kLeastTiled = 9;

template <class S>
Module<S> read_module(
    const View& v, const std::vector<Tensor>& params, const std::vector<int64_t>& options,
    const std::vector<double>& eps, bool threads, Arena& arena) {
  using A = AccOf<S>;
  STD_TORCH_CHECK(options.size() == 11, "options: expected 11 numbers, got ", options.size());
  Module<S> m;
  m.combine = combine_of(options[0]);
  m.residual = options[1] != 0;
  const int64_t layers = options[2], convolutions = options[6];
  const bool channel_hidden = options[3] != 0, channel_final = options[4] != 0;
  const bool spatial_hidden = options[8] != 0, spatial_final = options[9] != 0;
  m.has_channel = layers > 0, m.has_spatial = options[5] != 0;
  m.dilation = options[7];
  STD_TORCH_CHECK(
      m.dilation >= 1 && m.dilation <= kMostDilation, "dilation: expected 1 to ", kMostDilation,
      ", got ", m.dilation);
  STD_TORCH_CHECK(
      m.has_channel || m.has_spatial, "options: expected at least one branch, got none");
  Reader r(params, eps);
  int64_t ins = v.c;
  for (int64_t i = 0; i < layers; ++i) {
    const bool last = i == layers - 1;
    const Tensor& weight = r.next();
    STD_TORCH_CHECK(
        weight.dim() == 2, "channel.fc: expected a [out, in] weight, got ", weight.dim(), " axes");
    const int64_t outs = last ? v.c : weight.size(0);
    Linear<S> layer{nullptr, nullptr, {}, outs, ins};
    if (sizeof(S) == 2 && weight.scalar_type() == TypeOf<S>::value && weight.is_contiguous()) {
      check_tensor(weight, "channel.fc");
      check_shape(weight, "channel.fc", {outs, ins});
      layer.stored = data<S>(weight);
    } else {
      layer.weight = required<A>(weight, "channel.fc", {outs, ins}, arena);
    }
    const A* bias = values<A>(r.next(), "channel.fc's bias", {outs}, arena);
    layer.affine =
        read_norm<A>(r, "channel's norm", last ? channel_final : channel_hidden, bias, outs, outs, arena);
    m.mlp.push_back(layer);
    ins = outs;
    m.widest = outs > m.widest ? outs : m.widest;
  }
  if (m.has_spatial) {
    m.hidden = options[10];
    const int64_t h = m.hidden;
    STD_TORCH_CHECK(h >= 1, "options: expected a hidden width of at least 1, got ", h);
    if (std::is_same_v<S, bf16> && h >= kLeastTiled && convolutions > 0) m.amx = tables().amx;
    m.ld = m.amx ? (h + kTileDepth - 1) / kTileDepth * kTileDepth
                 : whole_vectors(h, kernels<S>().lanes);
    const int64_t ld = m.ld;
    // Where each gets two vectors: weights that a thread alone packs and uses stay in its cache.
    const int64_t shares = threads ? int64_t(torch::stable::get_num_threads()) : 1;
    m.by_output = v.n < shares && ld / kernels<S>().lanes >= 2 * shares;
    Packer<A> packer(arena);
    TilePacker tiles(m.amx, ld, arena);
    const Tensor& reduce = r.next();
    if (m.amx) {
      const bf16* w = required(bf16_values(reduce, kReduce, {h, v.c}, arena), kReduce, {h, v.c});
      m.tiled_reduce = tiles.matrix(w, h, v.c, v.channels_last);
    } else {
      m.reduce = packer.matrix(required<A>(reduce, kReduce, {h, v.c}, arena), h, v.c, ld);
    }
    const A* bias = values<A>(r.next(), "spatial.reduce's bias", {h}, arena);
    m.reduce_affine = read_norm<A>(r, "spatial's norm", spatial_hidden, bias, h, ld, arena);
    for (int64_t i = 0; i < convolutions; ++i) {
      const Tensor& conv = r.next();
      if (m.amx) {
        const bf16* w = bf16_values(conv, kConv, {h, h, 3, 3}, arena);
        m.tiled_convs.push_back(tiles.conv(required(w, kConv, {h, h, 3, 3}), h));
      } else {
        const A* w = required<A>(conv, kConv, {h, h, 3, 3}, arena);
        m.convs.push_back(packer.conv(w, h, ld, false, m.by_output));
      }
      bias = values<A>(r.next(), "spatial.dilated's bias", {h}, arena);
      m.conv_affines.push_back(
          read_norm<A>(r, "spatial's norm", spatial_hidden, bias, h, ld, arena));
    }
    m.project = padded(required<A>(r.next(), "spatial.project", {1, h}, arena), h, ld, arena);
    bias = values<A>(r.next(), "spatial.project's bias", {1}, arena);
    const Affine<A> last =
        read_norm<A>(r, "spatial's last norm", spatial_final, bias, 1, 1, arena);
    m.final_scale = last.scale ? *last.scale : A(1);
    m.final_shift = last.shift ? *last.shift : A(0);
    if (m.amx) tiles.run(threads);
    else packer.run(threads);
  }
  r.finish();
  return m;
}

// Work below this many elements of x is not worth waking threads for.
constexpr int64_t kSerial = 16384;

template <class Maps, class S>
void run(const Sample<S>& sample, S* out, const View& to) {
  using A = AccOf<S>;
  const Module<S>& m = sample.m;
  const View& v = sample.v;
  const int64_t parts = sample.parts;
  const bool threads = sample.threads;
  Arena arena;

  A* pool = m.has_channel ? arena.zeros<A>(parts * v.c) : nullptr;
  Maps maps(sample, arena);
  parallel(threads, parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) maps.reduce(i, pool ? pool + i * v.c : nullptr);
  });
  if (maps.joins())
    parallel(threads, parts, [&](int64_t begin, int64_t end) { maps.join(begin, end); });

  // The branches' layers side by side: of each layer every thread does its part.
  A *c = nullptr, *next_c = nullptr;
  if (m.has_channel) {
    c = arena.take<A>(std::max(v.c, m.widest));
    next_c = arena.take<A>(std::max(v.c, m.widest));
    for (int64_t i = 0; i < v.c; ++i) {
      A total = 0;
      for (int64_t part = 0; part < parts; ++part) total += pool[part * v.c + i];
      c[i] = total / A(v.p);
    }
  }
  const size_t linears = m.mlp.size(), convs = m.conv_affines.size();
  for (size_t i = 0; i < std::max(linears, convs); ++i) {
    parallel(threads, parts, [&](int64_t begin, int64_t end) {
      if (i < linears) {
        const Linear<S>& layer = m.mlp[i];
        const int64_t o0 = part(begin, parts, layer.outs), n = part(end, parts, layer.outs) - o0;
        const A* scale = layer.affine.scale ? layer.affine.scale + o0 : nullptr;
        const A* shift = layer.affine.shift ? layer.affine.shift + o0 : nullptr;
        auto apply = [&](auto linear, auto* weight) {
          linear(
              weight + o0 * layer.ins, c, n, layer.ins, scale, shift, i + 1 < linears, next_c + o0);
        };
        if (layer.stored) apply(kernels<S>().linear, layer.stored);
        else apply(kernels<A>().linear, layer.weight);
      }
      if (i < convs) maps.conv(i, begin, end);
    });
    if (i < linears) std::swap(c, next_c);
  }
  A* s = nullptr;
  if (m.has_spatial) {
    s = maps.logits();
    for (int64_t p = 0; p < v.p; ++p) s[p] = s[p] * m.final_scale + m.final_shift;
  }

  // Gate.
  A* c_room = arena.take<A>(v.c);
  A* s_room = arena.take<A>(v.p);
  const Gate<A> gate = prepare_gate<A>(
      m.combine, m.residual, v.channels_last, c, v.c, s, v.p, c_room, s_room);
  const int64_t lines = v.channels_last ? v.p : v.c;
  parallel(threads, parts, [&](int64_t begin, int64_t end) {
    const int64_t l0 = part(begin, parts, lines), l1 = part(end, parts, lines);
    const Kernels<S>& k = kernels<S>();
    const S* x = sample.x;
    if (v.channels_last) k.gate(gate, x, v.line, out, to.line, 0, v.c, l0, l1);
    else k.gate(gate, x, v.line, out, to.line, l0, l1, 0, v.p);
  });
}

template <class S>
void run(const Module<S>& m, const View& v, const S* x, S* out, const View& to, bool threads) {
  const int64_t parts = threads ? int64_t(torch::stable::get_num_threads()) : 1;
  const bool by_channel = parts > 1 && !v.channels_last && v.c >= 32 * parts;
  const Sample<S> sample{m, v, x, parts, threads, by_channel};
  if constexpr (std::is_same_v<S, bf16>)
    if (m.amx) return run<TileMaps>(sample, out, to);
  run<VectorMaps<S>>(sample, out, to);
}

} // namespace

Combine combine_of(int64_t mode) {
  STD_TORCH_CHECK(mode >= 0 && mode < 4, "combine: expected 0 to 3, got ", mode);
  return Combine(mode);
}

void bam_forward(
    Tensor x, Tensor out, std::vector<Tensor> params, std::vector<int64_t> options,
    std::vector<double> eps) {
  const View v = view_of(x, "x");
  check_tensor(out, "out");
  check_dtype(out, "out", x.scalar_type());
  check_shape(out, "out", {v.n, v.c, v.h, v.w});
  const View to = view_like(out, "out", v);
  if (x.numel() == 0) return;
  with_type(x.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    Arena arena;
    const int64_t threads = int64_t(torch::stable::get_num_threads());
    const bool wide = threads > 1 && v.n * v.c * v.p >= kSerial;
    const Module<S> m = read_module<S>(v, params, options, eps, wide, arena);
    const S* from = data<S>(x);
    S* into = mutable_data<S>(out);
    // As many samples as divide evenly run whole in a thread each, where x stays in its cache; the
    // rest are split, layer by layer.
    const int64_t whole = wide ? v.n / threads * threads : v.n;
    parallel(wide, whole, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        run<S>(m, v, from + n * v.sample, into + n * to.sample, to, false);
    });
    for (int64_t n = whole; n < v.n; ++n)
      run<S>(m, v, from + n * v.sample, into + n * to.sample, to, true);
  });
}

} // namespace bam
