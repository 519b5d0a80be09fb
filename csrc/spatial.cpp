// The spatial branch behind the reduction (Eq. 4) in training, forward and backward, on hidden maps
// of the whole batch: [N][P][ld] in the accumulator's type, 1/16 of x's size.
#include <algorithm>

#include "launch.h"
#include "norm.h"
#include "operators.h"

namespace bam {

namespace {

// Everything of one call but the maps.
template <class A>
struct Branch {
  View v;  // of the reduction: c is the hidden width
  int64_t h, ld, dilation;
  int64_t parts;  // of each sample
  bool threads;
  std::vector<const A*> weights, biases;   // packed, padded
  std::vector<const A*> gradient_weights;  // packed for the gradient, where that is asked for
  const A *project, *project_bias;
  std::vector<Norm<A>> hidden;  // none, or one in front of each convolution and of the projection
  Norm<A> final;

  int64_t map_size() const { return v.p * ld; }
  int64_t positions() const { return v.n * v.p; }
  A* maps(Arena& arena) const { return arena.take<A>(v.n * map_size()); }

  // f(item, sample, y0, y1) over samples and parts of their rows; `item` counts both.
  template <class F>
  void over_rows(const F& f) const {
    const int64_t cuts = std::min(parts, v.h);
    parallel(threads, v.n * cuts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        f(i, i / cuts, part(i % cuts, cuts, v.h), part(i % cuts + 1, cuts, v.h));
    });
  }
  int64_t items() const { return v.n * std::min(parts, v.h); }
  // f(item, at, n) over the same, as n positions that start with element `at` of maps.
  template <class F>
  void over_positions(const F& f) const {
    over_rows([&](int64_t item, int64_t sample, int64_t y0, int64_t y1) {
      f(item, sample * map_size() + y0 * v.w * ld, (y1 - y0) * v.w);
    });
  }

  // out [ld] of all items, in order, from what each has summed, [items][ld].
  void add_items(const A* partial, A* out) const {
    for (int64_t j = 0; j < ld; ++j) {
      double total = 0;
      for (int64_t i = 0; i < items(); ++i) total += double(partial[i * ld + j]);
      out[j] = A(total);
    }
  }

  // Mean and biased variance of maps z, into the norm; and [h] each into `taken`.
  void take_statistics(const A* z, Norm<A>& norm, A* taken, Arena& arena) const {
    const WideKernels<A>& k = wide_kernels<A>();
    A *partial = arena.take<A>(items() * ld), *mean = arena.take<A>(ld), *var = arena.take<A>(ld);
    over_positions([&](int64_t item, int64_t at, int64_t n) {
      k.moments(z + at, n, ld, nullptr, partial + item * ld);
    });
    add_items(partial, mean);
    for (int64_t j = 0; j < ld; ++j) mean[j] /= A(positions());
    over_positions([&](int64_t item, int64_t at, int64_t n) {
      k.moments(z + at, n, ld, mean, partial + item * ld);
    });
    add_items(partial, var);
    for (int64_t j = 0; j < ld; ++j) var[j] /= A(positions());
    std::copy(mean, mean + h, taken);
    std::copy(var, var + h, taken + h);
    norm.mean = mean, norm.variance = var;
    norm.settle(ld);
  }

  void activate(const A* z, A* a, const Norm<A>* norm) const {
    over_positions([&](int64_t, int64_t at, int64_t n) {
      wide_kernels<A>().activate(
          z + at, a + at, n, ld, norm ? norm->scale : nullptr, norm ? norm->shift : nullptr);
    });
  }

  Conv<A> convolution(const A* in, A* out, const A* weight, int64_t sample) const {
    return {
        in + sample * map_size(), out ? out + sample * map_size() : nullptr, weight, nullptr,
        nullptr, false, nullptr, v.h, v.w, dilation, h, ld, nullptr, nullptr};
  }

  // One convolution of all samples, weights packed; and with `logits` [N][P] the projection of it.
  // Where `act` is given, 0 where that is not above 0.
  void convolve(
      const A* in, A* out, const A* weight, const A* scale, const A* shift, bool relu, A* logits,
      const A* act = nullptr) const {
    over_rows([&](int64_t, int64_t sample, int64_t y0, int64_t y1) {
      Conv<A> conv = convolution(in, out, weight, sample);
      conv.scale = scale, conv.shift = shift, conv.relu = relu;
      conv.act = act ? act + sample * map_size() : nullptr;
      if (logits) conv.project = project, conv.logits = logits + sample * v.p;
      wide_kernels<A>().conv(conv, y0, y1, 0, ld / wide_kernels<A>().lanes);
    });
  }

  void projection(const A* in, A* logits) const {
    over_positions([&](int64_t, int64_t at, int64_t n) {
      wide_kernels<A>().project(in + at, n, ld, h, project, logits + at / ld);
    });
  }

  void load(const Tensor& reduced, A* z) const {
    parallel(threads, v.n, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        Arena own;
        load_hidden<A>(reduced, v, n, z + n * map_size(), ld, own);
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
Branch<A> read_branch(const Arguments& a, bool gradient, Arena& arena) {
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
  b.ld = whole_vectors(h, wide_kernels<A>().lanes);
  b.dilation = a.dilation;
  b.parts = b.v.n >= 8 ? 1 : (8 + b.v.n - 1) / b.v.n;
  b.threads = torch::stable::get_num_threads() > 1 && b.v.n * h * b.v.p >= 4096;
  Packer<A> packer(arena);
  for (size_t i = 0; i < count; ++i) {
    const A* weight = values<A>(a.weights[i], "weights", {h, h, 3, 3}, arena);
    STD_TORCH_CHECK(weight, "weights: expected shape [", h, ", ", h, ", 3, 3], got none");
    b.weights.push_back(packer.conv(weight, h, b.ld));
    if (gradient) b.gradient_weights.push_back(packer.conv(weight, h, b.ld, true));
    const A* bias = a.biases.empty() ? nullptr : values<A>(a.biases[i], "biases", {h}, arena);
    b.biases.push_back(padded(bias, h, b.ld, arena));
  }
  packer.run(b.threads);
  b.project = values<A>(a.project_weight, "project_weight", {h}, arena);
  STD_TORCH_CHECK(b.project, "project_weight: expected shape [", h, "], got none");
  b.project = padded(b.project, h, b.ld, arena);
  b.project_bias = values<A>(a.project_bias, "project_bias", {1}, arena);
  size_t known = 0;
  for (size_t i = 0; i < norms; ++i) {
    Norm<A> norm;
    const bool inner = a.hidden_norm && i <= count;
    const int64_t width = inner ? h : 1, room = inner ? b.ld : 1;
    auto read = [&](const Tensor& t, const char* name) {
      return padded(values<A>(t, name, {width}, arena), width, room, arena);
    };
    if (!a.gammas.empty()) {
      norm.gamma = read(a.gammas[i], "gammas");
      norm.beta = read(a.betas[i], "betas");
    }
    norm.exists = true, norm.batch = a.batch_stats[i], norm.eps = a.eps[i];
    norm.make_room(room, arena);
    if (!norm.batch) {
      STD_TORCH_CHECK(
          known < a.means.size() && known < a.variances.size(),
          "means, variances: expected one for each norm that uses running statistics");
      norm.mean = read(a.means[known], "means");
      norm.variance = read(a.variances[known++], "variances");
      norm.settle(room);
    }
    if (inner) b.hidden.push_back(norm);
    else b.final = norm;
  }
  return b;
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
  Branch<A> b = read_branch<A>(a, false, arena);
  const size_t count = b.weights.size();
  A* taken = mutable_data<A>(statistics);
  auto room = [&](const Norm<A>& norm, int64_t width) {
    A* at = taken;
    if (norm.batch) taken += 2 * width;
    return at;
  };
  A* maps[2] = {b.maps(arena), count ? b.maps(arena) : nullptr};
  A* out = mutable_data<A>(logits);
  b.load(a.reduced, maps[0]);
  if (!b.hidden.empty() && b.hidden[0].batch)
    b.take_statistics(maps[0], b.hidden[0], room(b.hidden[0], b.h), arena);
  b.activate(maps[0], maps[0], b.hidden.empty() ? nullptr : &b.hidden[0]);
  if (count == 0) b.projection(maps[0], out);
  for (size_t i = 0; i < count; ++i) {
    A *from = maps[i % 2], *to = maps[1 - i % 2];
    A* projected = i + 1 == count ? out : nullptr;
    Norm<A>* norm = b.hidden.empty() ? nullptr : &b.hidden[i + 1];
    const A* weight = b.weights[i];
    if (norm && norm->batch) {
      b.convolve(from, to, weight, nullptr, b.biases[i], false, nullptr);
      b.take_statistics(to, *norm, room(*norm, b.h), arena);
      b.activate(to, to, norm);
      if (projected) b.projection(to, projected);
      continue;
    }
    const A *scale = nullptr, *shift = b.biases[i];
    if (norm) {
      A* folded = arena.take<A>(b.ld);
      for (int64_t j = 0; j < b.ld; ++j)
        folded[j] = norm->shift[j] + (b.biases[i] ? b.biases[i][j] * norm->scale[j] : A(0));
      scale = norm->scale, shift = folded;
    }
    b.convolve(from, to, weight, scale, shift, true, projected);
  }
  const int64_t n = b.positions();
  const A bias = b.project_bias ? *b.project_bias : A(0);
  for (int64_t i = 0; i < n; ++i) out[i] += bias;
  if (b.final.exists) {
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

// dw [h][h][9]: groups of samples, each with all taps while their maps are in cache, then their sum.
template <class A>
void weight_gradient(const Branch<A>& b, const A* dz, const A* in, A* dw) {
  const WideKernels<A>& k = wide_kernels<A>();
  const int64_t h = b.h, ld = b.ld, size = 9 * h * ld;
  const int64_t groups = std::min<int64_t>(b.v.n, 4), cuts = h >= 24 ? 4 : 1;
  Arena arena;
  A* sums = arena.zeros<A>(groups * size);
  parallel(b.threads, groups * cuts, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / cuts, cut = item % cuts;
      for (int64_t s = part(group, groups, b.v.n); s < part(group + 1, groups, b.v.n); ++s)
        k.conv_weight_gradient(
            b.convolution(in, nullptr, nullptr, s), dz + s * b.map_size(), part(cut, cuts, h),
            part(cut + 1, cuts, h), sums + group * size);
    }
  });
  parallel(b.threads, h, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t group = 1; group < groups; ++group)
        for (int64_t tap = 0; tap < 9; ++tap)
          for (int64_t j = 0; j < ld; ++j)
            sums[(tap * h + i) * ld + j] += sums[group * size + (tap * h + i) * ld + j];
      k.transpose(sums + i * ld, h * ld, 9, h, dw + i * 9, h * 9, 9);
    }
  });
}

template <class A>
void backward(
    const Arguments& a, const Tensor& dlogits, const Tensor& statistics, const Tensor& dreduced,
    const Tensor& dconvolutions, const Tensor& dprojection, const Tensor& dnorms) {
  Arena arena;
  Branch<A> b = read_branch<A>(a, true, arena);
  const WideKernels<A>& k = wide_kernels<A>();
  const size_t count = b.weights.size();
  const int64_t h = b.h, n = b.v.n, total = b.positions();
  const int64_t ld = b.ld;
  const A* taken = data<A>(statistics);
  auto known = [&](Norm<A>& norm, int64_t width, int64_t room) {
    if (!norm.batch) return;
    norm.mean = padded(taken, width, room, arena);
    norm.variance = padded(taken + width, width, room, arena);
    taken += 2 * width;
    norm.settle(room);
  };
  for (Norm<A>& norm : b.hidden) known(norm, h, ld);
  if (b.final.exists) known(b.final, 1, 1);
  const bool normed = !b.hidden.empty();

  // The maps anew: z[i] in front of a norm, a[i] behind norm and ReLU.
  std::vector<A*> z(count + 1, nullptr), act(count + 1, nullptr);
  for (size_t i = 0; i <= count; ++i) {
    act[i] = b.maps(arena);
    z[i] = normed ? b.maps(arena) : act[i];
    if (i == 0) {
      b.load(a.reduced, z[0]);
      b.activate(z[0], act[0], normed ? &b.hidden[0] : nullptr);
      continue;
    }
    b.convolve(act[i - 1], z[i], b.weights[i - 1], nullptr, b.biases[i - 1], !normed, nullptr);
    if (normed) b.activate(z[i], act[i], &b.hidden[i]);
  }

  // Through the last norm, to the gradient of the projection's output.
  A* dq = arena.take<A>(total);
  const A* dl = data<A>(dlogits);
  A* norms_out = mutable_data<A>(dnorms);
  A* final_out = norms_out + (normed ? 2 * h * int64_t(count + 1) : 0);
  double dbias = 0;
  if (b.final.exists) {
    A* q = arena.take<A>(total);
    b.projection(act[count], q);
    const A mean = *b.final.mean - (b.project_bias ? *b.project_bias : A(0));
    const A rstd = *b.final.rstd, scale = *b.final.scale;
    double sums = 0, products = 0;
    for (int64_t i = 0; i < total; ++i) {
      sums += double(dl[i]);
      products += double(dl[i]) * double((q[i] - mean) * rstd);
    }
    final_out[0] = A(products), final_out[1] = A(sums);
    const A mean_grad = A(sums / double(total)), mean_product = A(products / double(total));
    for (int64_t i = 0; i < total; ++i) {
      A grad = dl[i];  // through known statistics nothing flows: not 0 * infinity
      if (b.final.batch) grad -= mean_grad + (q[i] - mean) * rstd * mean_product;
      dq[i] = scale * grad;
    }
  } else {
    std::copy(dl, dl + total, dq);
  }
  for (int64_t i = 0; i < total; ++i) dbias += double(dq[i]);

  A* du = b.maps(arena);
  A* next = count ? b.maps(arena) : nullptr;
  A* partial = arena.take<A>(2 * b.items() * ld);
  A* sums = arena.take<A>(2 * ld);
  b.over_positions([&](int64_t item, int64_t at, int64_t n) {
    k.project_gradient(
        dq + at / ld, act[count] + at, n, ld, b.project, du + at, partial + item * ld);
  });
  b.add_items(partial, sums);
  A* projection = arena.take<A>(h + 1);
  std::copy(sums, sums + h, projection);
  projection[h] = A(dbias);
  write_values<A>(projection, dprojection, h + 1);

  // From the gradient behind norm i to the one in front of it, in place.
  auto through_norm = [&](size_t i) {
    if (!normed) return;
    const Norm<A>& norm = b.hidden[i];
    A* others = partial + b.items() * ld;
    b.over_positions([&](int64_t item, int64_t at, int64_t n) {
      k.norm_sums(
          du + at, z[i] + at, n, ld, norm.mean, norm.rstd, partial + item * ld, others + item * ld);
    });
    b.add_items(partial, sums);
    b.add_items(others, sums + ld);
    A* out = norms_out + 2 * h * int64_t(i);  // gamma's, then beta's
    std::copy(sums + ld, sums + ld + h, out);
    std::copy(sums, sums + h, out + h);
    for (int64_t j = 0; j < 2 * ld; ++j) sums[j] /= A(total);
    b.over_positions([&](int64_t, int64_t at, int64_t n) {
      k.norm_gradient(
          du + at, z[i] + at, n, ld, norm.mean, norm.rstd, norm.scale,
          norm.batch ? sums : nullptr, norm.batch ? sums + ld : nullptr);
    });
  };

  const bool need_weights = !absent(dconvolutions);
  const int64_t length = h * h * 9 + h;
  A* flat = need_weights ? arena.take<A>(int64_t(count) * length) : nullptr;
  const bool need_first = !absent(dreduced) || normed;
  for (size_t i = count; i-- > 0;) {
    through_norm(i + 1);
    if (need_weights) {
      A* out = flat + int64_t(i) * length;
      weight_gradient(b, du, act[i], out);
      b.over_positions([&](int64_t item, int64_t at, int64_t n) {
        k.moments(du + at, n, ld, nullptr, partial + item * ld);
      });
      b.add_items(partial, sums);
      std::copy(sums, sums + h, out + h * h * 9);
    }
    if (i == 0 && !need_first) break;
    b.convolve(du, next, b.gradient_weights[i], nullptr, nullptr, false, nullptr, act[i]);
    std::swap(du, next);
  }
  if (need_first) through_norm(0);
  if (need_weights && count) write_values<A>(flat, dconvolutions, int64_t(count) * length);
  if (!absent(dreduced)) {
    const View to = view_like(dreduced, "dreduced", b.v);
    parallel(b.threads, n, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        Arena own;
        store_hidden<A>(du + s * b.map_size(), ld, dreduced, to, s, 0, b.v.p, own);
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
