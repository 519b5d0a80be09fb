// A whole module in inference: batch norms with known statistics, one read of x for pooling and
// reduction, and one for the gate.
#include <cmath>
#include <cstring>

#include "launch.h"
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

// As `values`, of what cannot be absent.
template <class A>
const A* required(
    const Tensor& t, const char* name, std::initializer_list<int64_t> shape, Arena& arena) {
  const A* p = values<A>(t, name, shape, arena);
  STD_TORCH_CHECK(
      p != nullptr, name, ": expected shape ", shape_text(shape.begin(), int64_t(shape.size())),
      ", got a tensor without elements");
  return p;
}

template <class A>
struct Linear {
  const A* weight;
  Affine<A> affine;
  int64_t outs, ins;
};

template <class S>
struct Module {
  using A = AccOf<S>;
  Combine combine;
  bool residual, has_channel, has_spatial;
  std::vector<Linear<A>> mlp;
  const A* reduce = nullptr;
  Affine<A> reduce_affine;
  std::vector<const A*> convs;
  std::vector<Affine<A>> conv_affines;
  const A* project = nullptr;
  A final_scale = 1, final_shift = 0;
  int64_t hidden = 0, ld = 0, dilation = 1, widest = 0;  // ld: the hidden width in whole vectors
  bool by_output = false;  // whether threads that share a sample share out a convolution's outputs
};

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
    Linear<A> layer{required<A>(weight, "channel.fc", {outs, ins}, arena), {}, outs, ins};
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
    const int64_t ld = m.ld = whole_vectors(h, kernels<S>().lanes);
    m.reduce = required<A>(r.next(), "spatial.reduce", {h, v.c}, arena);
    // Where each gets two vectors: weights that a thread alone packs and uses stay in its cache.
    const int64_t shares = threads ? int64_t(torch::stable::get_num_threads()) : 1;
    m.by_output = v.n < shares && ld / kernels<S>().lanes >= 2 * shares;
    Packer<A> packer(arena);
    m.reduce = packer.matrix(m.reduce, h, v.c, ld);
    const A* bias = values<A>(r.next(), "spatial.reduce's bias", {h}, arena);
    m.reduce_affine = read_norm<A>(r, "spatial's norm", spatial_hidden, bias, h, ld, arena);
    for (int64_t i = 0; i < convolutions; ++i) {
      const A* weight = required<A>(r.next(), "spatial.dilated", {h, h, 3, 3}, arena);
      m.convs.push_back(packer.conv(weight, h, ld, false, m.by_output));
      bias = values<A>(r.next(), "spatial.dilated's bias", {h}, arena);
      m.conv_affines.push_back(
          read_norm<A>(r, "spatial's norm", spatial_hidden, bias, h, ld, arena));
    }
    m.project = required<A>(r.next(), "spatial.project", {1, h}, arena);
    bias = values<A>(r.next(), "spatial.project's bias", {1}, arena);
    const Affine<A> last =
        read_norm<A>(r, "spatial's last norm", spatial_final, bias, 1, 1, arena);
    m.final_scale = last.scale ? *last.scale : A(1);
    m.final_shift = last.shift ? *last.shift : A(0);
    packer.run(threads);
  }
  r.finish();
  return m;
}

// Work below this many elements of x is not worth waking threads for.
constexpr int64_t kSerial = 16384;

template <class S>
void run(
    const Module<S>& m, const View& v, const S* x, S* out, const View& to, bool threads) {
  using A = AccOf<S>;
  const Kernels<S>& k = kernels<S>();
  const WideKernels<A>& wide = wide_kernels<A>();
  const int64_t parts = threads ? int64_t(torch::stable::get_num_threads()) : 1;
  Arena arena;

  // Pool and reduction. In NCHW threads share out the channels, where there are enough of them: what
  // a thread has read of x is then what it gates, and each has its part of the sums.
  const bool by_channel = parts > 1 && !v.channels_last && v.c >= 32 * parts;
  const int64_t size = v.p * m.ld;
  A* maps[2] = {nullptr, nullptr};
  if (m.has_spatial) maps[0] = arena.take<A>(by_channel ? parts * size : size);
  if (!m.convs.empty()) maps[1] = arena.take<A>(size);
  A* pool = m.has_channel ? arena.zeros<A>(parts * v.c) : nullptr;
  const Affine<A>& affine = m.reduce_affine;
  const Reduce<S> whole{
      x, v.line, v.channels_last, v.c, m.hidden, m.reduce, m.ld, maps[0], affine.scale,
      affine.shift, true};
  parallel(threads, parts, [&](int64_t begin, int64_t end) {
    Arena own;
    A* scratch = own.take<A>(k.reduce_scratch(v.c));
    for (int64_t i = begin; i < end; ++i) {
      A* sums = pool ? pool + i * v.c : nullptr;
      if (!by_channel) {
        k.reduce(whole, part(i, parts, v.p), part(i + 1, parts, v.p), sums, scratch);
        continue;
      }
      const int64_t c0 = part(i, parts, v.c), c1 = part(i + 1, parts, v.c);
      Reduce<S> some = whole;
      some.x = x + c0 * v.line, some.channels = c1 - c0, some.weight = m.reduce + c0 * m.ld;
      some.out = maps[0] + i * size;
      some.scale = some.shift = nullptr, some.relu = false;
      k.reduce(some, 0, v.p, sums ? sums + c0 : nullptr, scratch);
    }
  });
  if (by_channel && m.has_spatial)
    parallel(threads, parts, [&](int64_t begin, int64_t end) {
      const int64_t p0 = part(begin, parts, v.p), n = part(end, parts, v.p) - p0;
      A* sum = maps[0] + p0 * m.ld;
      for (int64_t i = 1; i < parts; ++i) wide.add(sum, sum + i * size, n * m.ld);
      wide.activate(sum, sum, n, m.ld, affine.scale, affine.shift);
    });

  // The branches' layers side by side: of each layer every thread does its part.
  A *c = nullptr, *next_c = nullptr, *s = nullptr;
  if (m.has_channel) {
    c = arena.take<A>(std::max(v.c, m.widest));
    next_c = arena.take<A>(std::max(v.c, m.widest));
    for (int64_t i = 0; i < v.c; ++i) {
      A total = 0;
      for (int64_t part = 0; part < parts; ++part) total += pool[part * v.c + i];
      c[i] = total / A(v.p);
    }
  }
  const bool by_output = m.by_output && threads;
  const int64_t partial = by_output ? parts : 1;  // sums of the last layer
  if (m.has_spatial) s = arena.zeros<A>(partial * v.p);
  const size_t linears = m.mlp.size(), convs = m.convs.size();
  for (size_t i = 0; i < std::max(linears, convs); ++i) {
    parallel(threads, parts, [&](int64_t begin, int64_t end) {
      if (i < linears) {
        const Linear<A>& layer = m.mlp[i];
        const int64_t o0 = part(begin, parts, layer.outs), o1 = part(end, parts, layer.outs);
        const A *scale = layer.affine.scale, *shift = layer.affine.shift;
        wide.linear(
            layer.weight + o0 * layer.ins, c, o1 - o0, layer.ins, scale ? scale + o0 : nullptr,
            shift ? shift + o0 : nullptr, i + 1 < linears, next_c + o0);
      }
      if (i < convs) {
        const Conv<A> conv{
            maps[i % 2], maps[1 - i % 2], m.convs[i], m.conv_affines[i].scale,
            m.conv_affines[i].shift, true, nullptr, v.h, v.w, m.dilation, m.hidden, m.ld,
            i + 1 == convs ? m.project : nullptr, s + (by_output ? begin * v.p : 0)};
        const int64_t vecs = m.ld / wide.lanes;
        if (by_output) wide.conv(conv, 0, v.h, part(begin, parts, vecs), part(end, parts, vecs));
        else wide.conv(conv, part(begin, parts, v.h), part(end, parts, v.h), 0, vecs);
      }
    });
    if (i < linears) std::swap(c, next_c);
  }
  if (m.has_spatial) {
    if (convs == 0) wide.project(maps[0], v.p, m.ld, m.hidden, m.project, s);
    for (int64_t p = 0; p < v.p; ++p) {
      A total = s[p];
      for (int64_t i = 1; convs > 0 && i < partial; ++i) total += s[i * v.p + p];
      s[p] = total * m.final_scale + m.final_shift;
    }
  }

  // Gate.
  A* c_room = arena.take<A>(v.c);
  A* s_room = arena.take<A>(v.p);
  const Gate<A> gate = prepare_gate<A>(
      m.combine, m.residual, v.channels_last, c, v.c, s, v.p, c_room, s_room);
  const int64_t lines = v.channels_last ? v.p : v.c;
  parallel(threads, parts, [&](int64_t begin, int64_t end) {
    const int64_t l0 = part(begin, parts, lines), l1 = part(end, parts, lines);
    if (v.channels_last) k.gate(gate, x, v.line, out, to.line, 0, v.c, l0, l1);
    else k.gate(gate, x, v.line, out, to.line, l0, l1, 0, v.p);
  });
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
