// The spatial branch behind the reduction (Eq. 4) in training, forward and backward, on zero-padded
// planes of the whole batch: [N][h] planes in the accumulator's type, 1/16 of x's size.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "launch.h"
#include "operators.h"

namespace bam {

namespace {

template <class A>
struct Norm {
  const A *gamma = nullptr, *beta = nullptr;
  bool batch = false;
  double eps = 0;
  const A *mean = nullptr, *variance = nullptr;
  // From mean and variance: z -> (z - mean) * rstd, and (z - mean) * scale + beta = z * scale + shift.
  A *rstd = nullptr, *scale = nullptr, *shift = nullptr;

  void settle(int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
      rstd[i] = A(1) / std::sqrt(variance[i] + A(eps));
      scale[i] = rstd[i] * (gamma ? gamma[i] : A(1));
      shift[i] = (beta ? beta[i] : A(0)) - mean[i] * scale[i];
    }
  }
};

// Everything of one call but the maps.
template <class A>
struct Branch {
  View v;  // of the reduction: c is the hidden width
  int64_t h;
  Planes g;
  const void* mask;
  int64_t vectors;    // of a span
  int64_t span;       // elements of a span of logits
  int64_t parts;      // of each sample
  bool threads;
  std::vector<const A*> weights, biases;  // the weights packed where `packed`
  bool packed;
  const A *project, *project_bias;
  std::vector<Norm<A>> hidden;  // none, or one in front of each convolution and of the projection
  bool has_final;
  Norm<A> final;

  int64_t map_size() const { return h * g.plane; }
  A* maps(Arena& arena) const { return arena.zeros<A>(v.n * map_size()); }

  // f(n, j0, j1) over samples and channels.
  template <class F>
  void over_channels(const F& f) const {
    const int64_t cuts = std::min(parts, h);
    parallel(threads, v.n * cuts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        f(i / cuts, part(i % cuts, cuts, h), part(i % cuts + 1, cuts, h));
    });
  }
  // f(n, v0, v1) over samples and `count` vectors.
  template <class F>
  void over_vectors(int64_t count, const F& f) const {
    const int64_t cuts = std::min(parts, count);
    parallel(threads, v.n * cuts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        f(i / cuts, part(i % cuts, cuts, count), part(i % cuts + 1, cuts, count));
    });
  }

  int64_t positions() const { return v.n * v.p; }

  const A* pack(const A* weight, Arena& arena) const {
    if (!packed) return weight;
    A* out = arena.take<A>(h * h * 9);
    wide_kernels<A>().pack(weight, h, h * 9, out);
    return out;
  }

  // out[j] of all samples, in order, from per-sample values [N][h].
  static void add_samples(const A* partial, int64_t n, int64_t h, A* out) {
    for (int64_t j = 0; j < h; ++j) {
      double total = 0;
      for (int64_t i = 0; i < n; ++i) total += double(partial[i * h + j]);
      out[j] = A(total);
    }
  }

  // Mean and biased variance of maps z, into the norm.
  void take_statistics(const A* z, Norm<A>& norm, A* mean, A* variance, Arena& arena) const {
    const WideKernels<A>& k = wide_kernels<A>();
    A* partial = arena.take<A>(v.n * h);
    over_channels([&](int64_t n, int64_t j0, int64_t j1) {
      k.moments(z + n * map_size(), g, mask, nullptr, j0, j1, partial + n * h);
    });
    add_samples(partial, v.n, h, mean);
    for (int64_t j = 0; j < h; ++j) mean[j] /= A(positions());
    over_channels([&](int64_t n, int64_t j0, int64_t j1) {
      k.moments(z + n * map_size(), g, mask, mean, j0, j1, partial + n * h);
    });
    add_samples(partial, v.n, h, variance);
    for (int64_t j = 0; j < h; ++j) variance[j] /= A(positions());
    norm.mean = mean, norm.variance = variance;
    norm.settle(h);
  }

  void activate(const A* z, A* a, const Norm<A>* norm) const {
    over_channels([&](int64_t n, int64_t j0, int64_t j1) {
      wide_kernels<A>().activate(
          z + n * map_size(), a + n * map_size(), g, mask, norm ? norm->scale : nullptr,
          norm ? norm->shift : nullptr, j0, j1);
    });
  }

  // One convolution of all samples. With `project`, logits [N][span] come with it.
  void convolve(
      const A* in, A* out, const A* weight, const A* scale, const A* shift, bool relu,
      const A* projection, A* logits) const {
    over_vectors(g.vectors, [&](int64_t n, int64_t v0, int64_t v1) {
      const Conv<A> conv{
          in + n * map_size(), out ? out + n * map_size() : nullptr, weight, scale, shift, relu, h,
          &g, mask, projection, logits ? logits + n * span : nullptr, packed};
      wide_kernels<A>().conv(conv, v0, v1);
    });
  }

  void projection(const A* in, A* logits) const {
    over_vectors(vectors, [&](int64_t n, int64_t v0, int64_t v1) {
      wide_kernels<A>().project(in + n * map_size(), g, h, project, logits + n * span, v0, v1);
    });
  }

  // The reduction as padded planes.
  void load(const Tensor& reduced, A* z) const {
    parallel(threads, v.n, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        Arena own;
        A* planar = own.take<A>(h * v.p);
        load_planar<A>(reduced, v, n, planar, own);
        for (int64_t j = 0; j < h; ++j)
          for (int64_t row = 0; row < v.h; ++row)
            std::memcpy(
                z + n * map_size() + j * g.plane + g.origin + row * g.pitch,
                planar + j * v.p + row * v.w, size_t(v.w) * sizeof(A));
      }
    });
  }
};

struct Arguments {
  const Tensor& reduced;
  const std::vector<Tensor>&weights, &biases;
  const Tensor &project_weight, &project_bias;
  const std::vector<Tensor>&gammas, &betas, &means, &variances;
  bool hidden_norm, norm;
  const std::vector<bool>& batch_stats;
  const std::vector<double>& eps;
  int64_t dilation;
};

template <class A>
Branch<A> read_branch(const Arguments& a, Arena& arena) {
  Branch<A> b;
  b.v = view_of(a.reduced, "reduced");
  const int64_t h = b.h = b.v.c;
  const size_t count = a.weights.size();
  STD_TORCH_CHECK(
      a.dilation >= 1 && a.dilation <= kMostDilation, "dilation: expected 1 to ", kMostDilation,
      ", got ", a.dilation);
  STD_TORCH_CHECK(
      a.biases.empty() || a.biases.size() == count, "biases: expected none or ", count, ", got ",
      a.biases.size());
  const size_t norms = (a.hidden_norm ? count + 1 : 0) + (a.norm ? 1 : 0);
  STD_TORCH_CHECK(
      a.batch_stats.size() == norms && a.eps.size() == norms, "batch_stats, eps: expected ", norms,
      " of each, got ", a.batch_stats.size(), " and ", a.eps.size());
  STD_TORCH_CHECK(
      a.gammas.size() == a.betas.size() && (a.gammas.empty() || a.gammas.size() == norms),
      "gammas, betas: expected none or ", norms, " of each");
  const int lanes = kernels<A>().lanes;
  b.g = planes_of(b.v.h, b.v.w, count ? a.dilation : 1, lanes);
  b.vectors = (b.g.span + lanes - 1) / lanes;
  b.span = b.vectors * lanes + 16;
  b.mask = pixel_mask<A>(b.g, b.span, arena);
  b.parts = b.v.n >= 8 ? 1 : (8 + b.v.n - 1) / b.v.n;
  b.threads = torch::stable::get_num_threads() > 1 && b.v.n * h * b.v.p >= 4096;
  b.packed = b.v.n * b.v.p >= kPacking;
  for (size_t i = 0; i < count; ++i) {
    const A* weight = values<A>(a.weights[i], "weights", {h, h, 3, 3}, arena);
    STD_TORCH_CHECK(weight, "weights: expected shape [", h, ", ", h, ", 3, 3], got none");
    b.weights.push_back(b.pack(weight, arena));
    b.biases.push_back(a.biases.empty() ? nullptr : values<A>(a.biases[i], "biases", {h}, arena));
  }
  b.project = values<A>(a.project_weight, "project_weight", {h}, arena);
  STD_TORCH_CHECK(b.project, "project_weight: expected shape [", h, "], got none");
  b.project_bias = values<A>(a.project_bias, "project_bias", {1}, arena);
  size_t known = 0;
  for (size_t i = 0; i < norms; ++i) {
    Norm<A> norm;
    const int64_t width = a.hidden_norm && i <= count ? h : 1;
    if (!a.gammas.empty()) {
      norm.gamma = values<A>(a.gammas[i], "gammas", {width}, arena);
      norm.beta = values<A>(a.betas[i], "betas", {width}, arena);
    }
    norm.batch = a.batch_stats[i], norm.eps = a.eps[i];
    norm.rstd = arena.take<A>(width), norm.scale = arena.take<A>(width);
    norm.shift = arena.take<A>(width);
    if (!norm.batch) {
      STD_TORCH_CHECK(
          known < a.means.size() && known < a.variances.size(),
          "means, variances: expected one for each norm that uses running statistics");
      norm.mean = values<A>(a.means[known], "means", {width}, arena);
      norm.variance = values<A>(a.variances[known++], "variances", {width}, arena);
      norm.settle(width);
    }
    if (a.hidden_norm && i <= count) b.hidden.push_back(norm);
    else b.final = norm;
  }
  b.has_final = a.norm;
  return b;
}

// [N][span] to dense [N][P].
template <class A>
void gather(const Branch<A>& b, const A* span, A* dense) {
  for (int64_t n = 0; n < b.v.n; ++n)
    for (int64_t row = 0; row < b.v.h; ++row)
      std::memcpy(
          dense + n * b.v.p + row * b.v.w, span + n * b.span + row * b.g.pitch,
          size_t(b.v.w) * sizeof(A));
}

// Mean and biased variance of n values.
template <class A>
void scalar_statistics(const A* x, int64_t n, A* mean, A* variance) {
  double total = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) total += double(x[i]);
  const double mu = total / double(n);
  for (int64_t i = 0; i < n; ++i) squares += (double(x[i]) - mu) * (double(x[i]) - mu);
  *mean = A(mu), *variance = A(squares / double(n));
}

template <class A>
void forward(const Arguments& a, const Tensor& logits, const Tensor& statistics) {
  Arena arena;
  Branch<A> b = read_branch<A>(a, arena);
  const size_t count = b.weights.size();
  A* taken = mutable_data<A>(statistics);
  auto room = [&](const Norm<A>& norm, int64_t width) {
    A* at = taken;
    if (norm.batch) taken += 2 * width;
    return at;
  };
  A* maps[2] = {b.maps(arena), count ? b.maps(arena) : nullptr};
  A* span = arena.take<A>(b.v.n * b.span);
  b.load(a.reduced, maps[0]);
  if (!b.hidden.empty() && b.hidden[0].batch) {
    A* at = room(b.hidden[0], b.h);
    b.take_statistics(maps[0], b.hidden[0], at, at + b.h, arena);
  }
  b.activate(maps[0], maps[0], b.hidden.empty() ? nullptr : &b.hidden[0]);
  for (size_t i = 0; i < count; ++i) {
    A *in = maps[i % 2], *out = maps[1 - i % 2];
    Norm<A>* norm = b.hidden.empty() ? nullptr : &b.hidden[i + 1];
    const bool last = i + 1 == count;
    if (norm && norm->batch) {
      b.convolve(in, out, b.weights[i], nullptr, b.biases[i], false, nullptr, nullptr);
      A* at = room(*norm, b.h);
      b.take_statistics(out, *norm, at, at + b.h, arena);
      b.activate(out, out, norm);
      if (last) b.projection(out, span);
      continue;
    }
    const A *scale = nullptr, *shift = b.biases[i];
    if (norm) {
      A* folded = arena.take<A>(b.h);
      for (int64_t j = 0; j < b.h; ++j)
        folded[j] = norm->shift[j] + (b.biases[i] ? b.biases[i][j] * norm->scale[j] : A(0));
      scale = norm->scale, shift = folded;
    }
    b.convolve(
        in, last ? nullptr : out, b.weights[i], scale, shift, true, last ? b.project : nullptr,
        last ? span : nullptr);
  }
  if (count == 0) b.projection(maps[0], span);
  A* out = mutable_data<A>(logits);
  gather(b, span, out);
  const int64_t n = b.positions();
  const A bias = b.project_bias ? *b.project_bias : A(0);
  for (int64_t i = 0; i < n; ++i) out[i] += bias;
  if (b.has_final) {
    if (b.final.batch) {
      A* at = room(b.final, 1);
      scalar_statistics(out, n, at, at + 1);
      b.final.mean = at, b.final.variance = at + 1;
      b.final.settle(1);
    }
    const A mean = *b.final.mean, scale = *b.final.scale, beta = b.final.beta ? *b.final.beta : A(0);
    for (int64_t i = 0; i < n; ++i) out[i] = (out[i] - mean) * scale + beta;
  }
}

template <class A>
void backward(
    const Arguments& a, const Tensor& dlogits, const Tensor& statistics, const Tensor& dreduced,
    const Tensor& dconvolutions, const Tensor& dprojection, const Tensor& dnorms) {
  Arena arena;
  Branch<A> b = read_branch<A>(a, arena);
  const WideKernels<A>& k = wide_kernels<A>();
  const size_t count = b.weights.size();
  const int64_t h = b.h, n = b.v.n, total = b.positions();
  const A* taken = data<A>(statistics);
  auto known = [&](Norm<A>& norm, int64_t width) {
    if (!norm.batch) return;
    norm.mean = taken, norm.variance = taken + width;
    taken += 2 * width;
    norm.settle(width);
  };
  for (Norm<A>& norm : b.hidden) known(norm, h);
  if (b.has_final) known(b.final, 1);
  const bool normed = !b.hidden.empty();

  // The maps anew: z[i] in front of a norm, a[i] behind norm and ReLU.
  std::vector<A*> z(count + 1, nullptr), act(count + 1, nullptr);
  for (size_t i = 0; i <= count; ++i) {
    act[i] = b.maps(arena);
    z[i] = normed ? b.maps(arena) : act[i];
    if (i == 0) b.load(a.reduced, z[0]);
    else b.convolve(act[i - 1], z[i], b.weights[i - 1], nullptr, b.biases[i - 1], false, nullptr, nullptr);
    b.activate(z[i], act[i], normed ? &b.hidden[i] : nullptr);
  }

  // Through the last norm, to the gradient of the projection's output by position of the span.
  A* dq = arena.zeros<A>(n * b.span);
  const A* dl = data<A>(dlogits);
  A* norms_out = mutable_data<A>(dnorms);
  A* final_out = norms_out + (normed ? 2 * h * int64_t(count + 1) : 0);
  A dbias = 0;
  {
    A* q = nullptr;
    A mean_grad = 0, mean_product = 0, scale = 1, mean = 0, rstd = 1;
    if (b.has_final) {
      A* span = arena.take<A>(n * b.span);
      q = arena.take<A>(total);
      b.projection(act[count], span);
      gather(b, span, q);
      mean = *b.final.mean - (b.project_bias ? *b.project_bias : A(0));
      rstd = *b.final.rstd, scale = *b.final.scale;
      double sums = 0, products = 0;
      for (int64_t i = 0; i < total; ++i) {
        sums += double(dl[i]);
        products += double(dl[i]) * double((q[i] - mean) * rstd);
      }
      final_out[0] = A(products), final_out[1] = A(sums);
      if (b.final.batch) mean_grad = A(sums / total), mean_product = A(products / total);
    }
    double bias_sum = 0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t row = 0; row < b.v.h; ++row)
        for (int64_t column = 0; column < b.v.w; ++column) {
          const int64_t at = i * b.v.p + row * b.v.w + column;
          A grad = dl[at];
          if (q) grad = scale * (grad - mean_grad - (q[at] - mean) * rstd * mean_product);
          dq[i * b.span + row * b.g.pitch + column] = grad;
          bias_sum += double(grad);
        }
    dbias = A(bias_sum);
  }

  A* du = b.maps(arena);
  A* next = count ? b.maps(arena) : nullptr;
  A* partial = arena.take<A>(2 * n * h);
  b.over_channels([&](int64_t i, int64_t j0, int64_t j1) {
    k.project_gradient(
        dq + i * b.span, act[count] + i * b.map_size(), b.g, b.project, du + i * b.map_size(),
        partial + i * h, j0, j1);
  });
  A* projection = arena.take<A>(h + 1);
  b.add_samples(partial, n, h, projection);
  projection[h] = dbias;
  write_values<A>(projection, dprojection, h + 1);

  // From the gradient behind norm i to the one in front of it, in place.
  auto through_norm = [&](size_t i) {
    if (!normed) return;
    const Norm<A>& norm = b.hidden[i];
    b.over_channels([&](int64_t s, int64_t j0, int64_t j1) {
      k.norm_sums(
          du + s * b.map_size(), z[i] + s * b.map_size(), b.g, norm.mean, norm.rstd, j0, j1,
          partial + s * h, partial + (n + s) * h);
    });
    A* out = norms_out + 2 * h * int64_t(i);  // gamma's, then beta's
    b.add_samples(partial, n, h, out + h);
    b.add_samples(partial + n * h, n, h, out);
    A* means = arena.zeros<A>(2 * h);
    if (norm.batch)
      for (int64_t j = 0; j < h; ++j) means[j] = out[h + j] / A(total), means[h + j] = out[j] / A(total);
    b.over_channels([&](int64_t s, int64_t j0, int64_t j1) {
      k.norm_gradient(
          du + s * b.map_size(), z[i] + s * b.map_size(), b.g, b.mask, norm.mean, norm.rstd,
          norm.scale, means, means + h, j0, j1);
    });
  };

  const bool need_weights = !absent(dconvolutions);
  const int64_t length = h * h * 9 + h;
  A* flat = need_weights ? arena.take<A>(int64_t(count) * length) : nullptr;
  const int64_t groups = std::min<int64_t>(n, 8), cuts = std::min(b.parts, (h + 3) / 4);
  A* group_sums = need_weights && count ? arena.take<A>(groups * h * h * 9) : nullptr;
  A* flipped = arena.take<A>(h * h * 9);
  const bool need_first = !absent(dreduced) || normed;
  for (size_t i = count; i-- > 0;) {
    through_norm(i + 1);
    if (need_weights) {
      std::memset(group_sums, 0, size_t(groups * h * h * 9) * sizeof(A));
      parallel(b.threads, groups * cuts, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t group = item / cuts, cut = item % cuts;
          const int64_t o0 = std::min(part(cut, cuts, (h + 3) / 4) * 4, h);
          const int64_t o1 = std::min(part(cut + 1, cuts, (h + 3) / 4) * 4, h);
          for (int64_t s = part(group, groups, n); s < part(group + 1, groups, n); ++s)
            k.conv_weight_gradient(
                du + s * b.map_size(), act[i] + s * b.map_size(), b.g, h, o0, o1,
                group_sums + group * h * h * 9);
        }
      });
      A* out = flat + int64_t(i) * length;
      std::memcpy(out, group_sums, size_t(h * h * 9) * sizeof(A));
      for (int64_t group = 1; group < groups; ++group)
        for (int64_t e = 0; e < h * h * 9; ++e) out[e] += group_sums[group * h * h * 9 + e];
      b.over_channels([&](int64_t s, int64_t j0, int64_t j1) {
        k.moments(du + s * b.map_size(), b.g, b.mask, nullptr, j0, j1, partial + s * h);
      });
      b.add_samples(partial, n, h, out + h * h * 9);
    }
    if (i == 0 && !need_first) break;
    const A* weight = values<A>(a.weights[i], "weights", {h, h, 3, 3}, arena);
    for (int64_t o = 0; o < h; ++o)
      for (int64_t in = 0; in < h; ++in)
        for (int64_t tap = 0; tap < 9; ++tap)
          flipped[(in * h + o) * 9 + tap] = weight[(o * h + in) * 9 + 8 - tap];
    b.convolve(du, next, b.pack(flipped, arena), nullptr, nullptr, false, nullptr, nullptr);
    std::swap(du, next);
    b.over_channels([&](int64_t s, int64_t j0, int64_t j1) {
      k.relu_gradient(du + s * b.map_size(), act[i] + s * b.map_size(), b.g, j0, j1);
    });
  }
  if (need_first) through_norm(0);
  if (need_weights && count) write_values<A>(flat, dconvolutions, int64_t(count) * length);
  if (!absent(dreduced)) {
    const View to = view_like(dreduced, "dreduced", b.v);
    with_type(dreduced.scalar_type(), [&](auto tag) {
      using S = decltype(tag);
      if constexpr (std::is_same_v<AccOf<S>, A>) {
        parallel(b.threads, n, [&](int64_t begin, int64_t end) {
          for (int64_t s = begin; s < end; ++s) {
            Arena own;
            S* out = mutable_data<S>(dreduced) + s * to.sample;
            A* line = own.take<A>(b.v.channels_last ? h * b.v.w : b.v.w);
            for (int64_t row = 0; row < b.v.h; ++row) {
              const A* from = du + s * b.map_size() + b.g.origin + row * b.g.pitch;
              if (b.v.channels_last) {
                for (int64_t j = 0; j < h; ++j)
                  for (int64_t c = 0; c < b.v.w; ++c) line[c * h + j] = from[j * b.g.plane + c];
                for (int64_t c = 0; c < b.v.w; ++c)
                  kernels<S>().narrow(line + c * h, out + (row * b.v.w + c) * to.line, h);
              } else {
                for (int64_t j = 0; j < h; ++j)
                  kernels<S>().narrow(
                      from + j * b.g.plane, out + j * to.line + row * b.v.w, b.v.w);
              }
            }
          }
        });
      }
    });
  }
}

} // namespace

static ScalarType logits_type(const Tensor& reduced) {
  return reduced.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The logits (or their gradient) and the flat statistics, both in the accumulator's type.
static void check_map_outputs(
    const Tensor& reduced, const Tensor& logits, const Tensor& statistics, size_t convolutions,
    bool hidden_norm, const std::vector<bool>& batch_stats) {
  check_tensor(reduced, "reduced");
  STD_TORCH_CHECK(reduced.dim() == 4, "reduced: expected [N, h, H, W], got ", reduced.dim(), " axes");
  check_dtype(logits, "logits", logits_type(reduced)), check_contiguous(logits, "logits");
  check_shape(logits, "logits", {reduced.size(0), 1, reduced.size(2), reduced.size(3)});
  check_dtype(statistics, "statistics", logits_type(reduced));
  int64_t size = 0;
  for (size_t i = 0; i < batch_stats.size(); ++i)
    if (batch_stats[i]) size += 2 * (hidden_norm && i <= convolutions ? reduced.size(1) : 1);
  check_shape(statistics, "statistics", {size}), check_contiguous(statistics, "statistics");
}

void spatial_forward(
    Tensor reduced, std::vector<Tensor> weights, std::vector<Tensor> biases, Tensor project_weight,
    Tensor project_bias, std::vector<Tensor> gammas, std::vector<Tensor> betas,
    std::vector<Tensor> means, std::vector<Tensor> variances, Tensor logits, Tensor statistics,
    bool hidden_norm, bool norm, std::vector<bool> batch_stats, std::vector<double> eps,
    int64_t dilation) {
  const Arguments a{
      reduced, weights, biases, project_weight, project_bias, gammas, betas, means, variances,
      hidden_norm, norm, batch_stats, eps, dilation};
  check_map_outputs(reduced, logits, statistics, a.weights.size(), hidden_norm, batch_stats);
  if (reduced.numel() == 0) return;
  if (reduced.scalar_type() == ScalarType::Double) forward<double>(a, logits, statistics);
  else forward<float>(a, logits, statistics);
}

void spatial_backward(
    Tensor dlogits, Tensor statistics, Tensor reduced, std::vector<Tensor> weights,
    std::vector<Tensor> biases, Tensor project_weight, Tensor project_bias,
    std::vector<Tensor> gammas, std::vector<Tensor> betas, std::vector<Tensor> means,
    std::vector<Tensor> variances, Tensor dreduced, Tensor dconvolutions, Tensor dprojection,
    Tensor dnorms, bool hidden_norm, bool norm, std::vector<bool> batch_stats,
    std::vector<double> eps, int64_t dilation) {
  const Arguments a{
      reduced, weights, biases, project_weight, project_bias, gammas, betas, means, variances,
      hidden_norm, norm, batch_stats, eps, dilation};
  check_map_outputs(reduced, dlogits, statistics, a.weights.size(), hidden_norm, batch_stats);
  const int64_t h = reduced.size(1), count = int64_t(weights.size());
  if (!absent(dreduced)) {
    check_tensor(dreduced, "dreduced"), check_dtype(dreduced, "dreduced", reduced.scalar_type());
    check_shape(dreduced, "dreduced", {reduced.size(0), h, reduced.size(2), reduced.size(3)});
  }
  if (!absent(dconvolutions)) {
    check_tensor(dconvolutions, "dconvolutions"), check_contiguous(dconvolutions, "dconvolutions");
    check_shape(dconvolutions, "dconvolutions", {count * (9 * h + 1) * h});
  }
  check_tensor(dprojection, "dprojection"), check_shape(dprojection, "dprojection", {h + 1});
  check_contiguous(dprojection, "dprojection");
  check_dtype(dnorms, "dnorms", logits_type(reduced));
  check_shape(dnorms, "dnorms", {(hidden_norm ? 2 * h * (count + 1) : 0) + (norm ? 2 : 0)});
  check_contiguous(dnorms, "dnorms");
  if (reduced.numel() == 0) return;
  if (reduced.scalar_type() == ScalarType::Double)
    backward<double>(a, dlogits, statistics, dreduced, dconvolutions, dprojection, dnorms);
  else
    backward<float>(a, dlogits, statistics, dreduced, dconvolutions, dprojection, dnorms);
}

} // namespace bam
