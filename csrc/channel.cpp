// The channel branch behind the pooling (Eq. 3) in training, forward and backward: one hidden layer.
#include <algorithm>

#include "launch.h"
#include "norm.h"
#include "operators.h"

namespace bam {

namespace {

constexpr int64_t kSerialWork = 1 << 17;  // multiplications below which threads are not worth waking

template <class A>
struct Mlp {
  int64_t n, channels, hidden, ld, lc;  // ld, lc: the widths in whole vectors
  bool threads;
  const A *pooled, *w0, *b0, *w1, *b1;  // pooled [n][channels]
  Norm<A> inner, outer;
};

// [rows][width] with ld values a row, zero behind: itself where that is so.
template <class A>
const A* padded_rows(const A* from, int64_t rows, int64_t width, int64_t ld, Arena& arena) {
  if (width == ld) return from;
  A* out = arena.zeros<A>(rows * ld);
  for (int64_t r = 0; r < rows; ++r)
    std::copy(from + r * width, from + (r + 1) * width, out + r * ld);
  return out;
}

// Mean and biased variance over rows of y [n][width].
template <class A>
void column_statistics(const A* y, int64_t n, int64_t width, A* mean, A* variance) {
  for (int64_t j = 0; j < width; ++j) {
    double total = 0, squares = 0;
    for (int64_t i = 0; i < n; ++i) total += double(y[i * width + j]);
    mean[j] = A(total / double(n));
    for (int64_t i = 0; i < n; ++i) {
      const double off = double(y[i * width + j]) - double(mean[j]);
      squares += off * off;
    }
    variance[j] = A(squares / double(n));
  }
}

template <class A>
void normalize(A* y, int64_t n, int64_t width, const Norm<A>& norm) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < width; ++j)
      y[i * width + j] =
          (y[i * width + j] - norm.mean[j]) * norm.scale[j] + (norm.beta ? norm.beta[j] : A(0));
}

// dy [n][width] from behind the norm of y to in front of it, in place; and its parameters'.
template <class A>
void norm_gradient(
    A* dy, const A* y, int64_t n, int64_t width, const Norm<A>& norm, A* dgamma, A* dbeta) {
  for (int64_t j = 0; j < width; ++j) {
    double sums = 0, products = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = i * width + j;
      sums += double(dy[at]);
      products += double(dy[at]) * double((y[at] - norm.mean[j]) * norm.rstd[j]);
    }
    dgamma[j] = A(products), dbeta[j] = A(sums);
    const A mean_gradient = A(sums / double(n)), mean_product = A(products / double(n));
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = i * width + j;
      A grad = dy[at];  // through known statistics nothing flows: not 0 * infinity
      if (norm.batch) grad -= mean_gradient + (y[at] - norm.mean[j]) * norm.rstd[j] * mean_product;
      dy[at] = norm.scale[j] * grad;
    }
  }
}

template <class A>
void linear(
    const Mlp<A>& m, const A* w, const A* bias, const A* x, int64_t ins, int64_t outs, A* y) {
  parallel(m.threads, m.n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels<A>().linear(w, x + i * ins, outs, ins, nullptr, bias, false, y + i * outs);
  });
}

template <class A>
void rectify(const A* from, A* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] < A(0) ? A(0) : from[i];
}

// out [rows][ld] = a . b, rows of `a` by any strides, b [k][ld] dense; in pieces of rows.
template <class A>
void multiply(
    bool threads, int64_t rows, int64_t k, const A* a, int64_t row, int64_t step, const A* b,
    int64_t ld, A* out) {
  const int64_t pieces = threads ? std::min<int64_t>(8, rows) : 1;
  parallel(threads, pieces, [&](int64_t begin, int64_t end) {
    const int64_t r0 = part(begin, pieces, rows), r1 = part(end, pieces, rows);
    const Term<A> term{a + r0 * row, b};
    const WideKernels<A>& wide = wide_kernels<A>();
    wide.product(
        {r1 - r0, ld / wide.lanes, &term, 1, k, row, step, ld, out + r0 * ld, ld, false});
  });
}

// out [rows][ld] without what is behind the width.
template <class A>
void write_rows(const A* from, int64_t rows, int64_t width, int64_t ld, const Tensor& to, Arena& arena) {
  if (width != ld) {
    A* dense = arena.take<A>(rows * width);
    for (int64_t r = 0; r < rows; ++r)
      std::copy(from + r * ld, from + r * ld + width, dense + r * width);
    from = dense;
  }
  write_values<A>(from, to, rows * width);
}

template <class A>
Mlp<A> read_mlp(
    const Tensor& pooled, const std::vector<Tensor>& params, const std::vector<bool>& norms,
    const std::vector<double>& eps, Arena& arena) {
  Mlp<A> m;
  m.n = pooled.size(0), m.channels = pooled.size(1), m.hidden = params[0].size(0);
  const int64_t c = m.channels, h = m.hidden;
  m.ld = whole_vectors(h, wide_kernels<A>().lanes), m.lc = whole_vectors(c, wide_kernels<A>().lanes);
  m.threads = torch::stable::get_num_threads() > 1 && m.n * c * h >= kSerialWork;
  m.pooled = values<A>(pooled, "pooled", {m.n, c}, arena);
  m.w0 = values<A>(params[0], "weight0", {h, c}, arena);
  m.b0 = values<A>(params[1], "bias0", {h}, arena);
  m.w1 = values<A>(params[2], "weight1", {c, h}, arena);
  m.b1 = values<A>(params[3], "bias1", {c}, arena);
  STD_TORCH_CHECK(m.w0 && m.w1, "weight0, weight1: expected [h, C] and [C, h], got none");
  for (int i = 0; i < 2; ++i) {
    Norm<A>& norm = i ? m.outer : m.inner;
    const int64_t width = i ? c : h;
    const Tensor* t = &params[size_t(4 + 4 * i)];
    norm.exists = norms[size_t(2 * i)], norm.batch = norms[size_t(2 * i + 1)];
    norm.eps = eps[size_t(i)];
    norm.gamma = values<A>(t[0], "gamma", {width}, arena);
    norm.beta = values<A>(t[1], "beta", {width}, arena);
    norm.mean = values<A>(t[2], "mean", {width}, arena);
    norm.variance = values<A>(t[3], "var", {width}, arena);
    if (!norm.exists) continue;
    norm.make_room(width, arena);
    STD_TORCH_CHECK(
        norm.batch || (norm.mean && norm.variance),
        "mean, var: expected running statistics of a norm that uses them, got none");
    if (!norm.batch) norm.settle(width);
  }
  return m;
}

void check_mlp(
    const Tensor& pooled, const std::vector<Tensor>& params, const std::vector<bool>& norms,
    const std::vector<double>& eps) {
  check_tensor(pooled, "pooled");
  STD_TORCH_CHECK(pooled.dim() == 2, "pooled: expected [N, C], got ", pooled.dim(), " axes");
  STD_TORCH_CHECK(params.size() == 12, "params: expected 12 tensors, got ", params.size());
  STD_TORCH_CHECK(
      norms.size() == 4 && eps.size() == 2, "norms, eps: expected 4 and 2, got ", norms.size(),
      " and ", eps.size());
  STD_TORCH_CHECK(params[0].dim() == 2, "weight0: expected [h, C], got ", params[0].dim(), " axes");
}

ScalarType wide_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A result of the accumulator's type, dense.
template <class A>
A* result(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  check_tensor(t, name), check_dtype(t, name, TypeOf<A>::value);
  check_shape(t, name, shape), check_contiguous(t, name);
  return mutable_data<A>(t);
}

template <class A>
void forward(Mlp<A>& m, const Tensor& logits, const Tensor& kept, const Tensor* taken, Arena& arena) {
  const int64_t n = m.n, h = m.hidden, c = m.channels;
  A* y = result<A>(kept, "kept", {n, h});
  A* out = result<A>(logits, "logits", {n, c});
  auto through = [&](Norm<A>& norm, A* values, int64_t width, const Tensor* statistics) {
    if (!norm.exists) return;
    if (norm.batch) {
      A* mean = result<A>(statistics[0], "mean", {width});
      A* variance = result<A>(statistics[1], "var", {width});
      column_statistics(values, n, width, mean, variance);
      norm.mean = mean, norm.variance = variance;
      norm.settle(width);
    }
    normalize(values, n, width, norm);
  };
  linear(m, m.w0, m.b0, m.pooled, c, h, y);
  A* active = arena.take<A>(n * h);
  std::copy(y, y + n * h, active);
  through(m.inner, active, h, taken);
  rectify(active, active, n * h);
  linear(m, m.w1, m.b1, active, h, c, out);
  through(m.outer, out, c, taken + 2);
}

template <class A>
void backward(
    Mlp<A>& m, const Tensor& dlogits, const Tensor& kept, const std::vector<Tensor>& grads,
    Arena& arena) {
  const int64_t n = m.n, h = m.hidden, c = m.channels;
  const A* y = values<A>(kept, "kept", {n, h}, arena);
  const A* dl = values<A>(dlogits, "dlogits", {n, c}, arena);
  STD_TORCH_CHECK(y && dl, "kept, dlogits: expected [N, h] and [N, C], got none");
  auto known = [&](Norm<A>& norm, const A* values, int64_t width) {
    if (!norm.exists || !norm.batch) return;
    A *mean = arena.take<A>(width), *variance = arena.take<A>(width);
    column_statistics(values, n, width, mean, variance);
    norm.mean = mean, norm.variance = variance;
    norm.settle(width);
  };
  auto write_norm = [&](const Norm<A>& norm, A* dy, const A* values, int64_t width, size_t at) {
    if (!norm.exists) return;
    A *dgamma = arena.take<A>(width), *dbeta = arena.take<A>(width);
    norm_gradient(dy, values, n, width, norm, dgamma, dbeta);
    write_values<A>(dgamma, grads[at], width);
    write_values<A>(dbeta, grads[at + 1], width);
  };
  auto write_sums = [&](const A* dy, int64_t width, const Tensor& to) {
    A* sums = arena.take<A>(width);
    for (int64_t j = 0; j < width; ++j) {
      double total = 0;
      for (int64_t i = 0; i < n; ++i) total += double(dy[i * width + j]);
      sums[j] = A(total);
    }
    write_values<A>(sums, to, width);
  };

  A* active = arena.take<A>(n * h);
  std::copy(y, y + n * h, active);
  known(m.inner, y, h);
  if (m.inner.exists) normalize(active, n, h, m.inner);
  rectify(active, active, n * h);
  A* dout = arena.take<A>(n * c);
  std::copy(dl, dl + n * c, dout);
  if (m.outer.exists) {
    A* out = arena.take<A>(n * c);
    linear(m, m.w1, m.b1, active, h, c, out);
    known(m.outer, out, c);
    write_norm(m.outer, dout, out, c, 7);
  }
  // To the hidden layer, and the last layer's parameters.
  A* dy = arena.take<A>(n * h);
  {
    A* wide = arena.take<A>(n * m.ld);
    multiply(m.threads, n, c, dout, c, 1, padded_rows(m.w1, c, h, m.ld, arena), m.ld, wide);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < h; ++j)
        dy[i * h + j] = active[i * h + j] <= A(0) ? A(0) : wide[i * m.ld + j];
  }
  A* dw1 = arena.take<A>(c * m.ld);
  multiply(m.threads, c, n, dout, 1, c, padded_rows(active, n, h, m.ld, arena), m.ld, dw1);
  write_rows(dw1, c, h, m.ld, grads[3], arena);
  write_sums(dout, c, grads[4]);
  write_norm(m.inner, dy, y, h, 5);
  // To the pooled vector, and the first layer's parameters.
  A* dw0 = arena.take<A>(h * m.lc);
  multiply(m.threads, h, n, dy, 1, h, padded_rows(m.pooled, n, c, m.lc, arena), m.lc, dw0);
  write_rows(dw0, h, c, m.lc, grads[1], arena);
  write_sums(dy, h, grads[2]);
  if (absent(grads[0])) return;
  A* dpooled = arena.take<A>(n * m.lc);
  multiply(m.threads, n, h, dy, h, 1, padded_rows(m.w0, h, c, m.lc, arena), m.lc, dpooled);
  write_rows(dpooled, n, c, m.lc, grads[0], arena);
}

}  // namespace

void channel_forward(
    Tensor pooled, std::vector<Tensor> params, Tensor logits, Tensor kept,
    std::vector<Tensor> taken, std::vector<bool> norms, std::vector<double> eps) {
  check_mlp(pooled, params, norms, eps);
  STD_TORCH_CHECK(taken.size() == 4, "taken: expected 4 tensors, got ", taken.size());
  auto run = [&](auto tag) {
    using A = decltype(tag);
    Arena arena;
    Mlp<A> m = read_mlp<A>(pooled, params, norms, eps, arena);
    forward(m, logits, kept, taken.data(), arena);
  };
  if (pooled.numel() == 0) return;
  if (wide_type(pooled) == ScalarType::Double) run(double{});
  else run(float{});
}

void channel_backward(
    Tensor dlogits, Tensor kept, Tensor pooled, std::vector<Tensor> params,
    std::vector<Tensor> grads, std::vector<bool> norms, std::vector<double> eps) {
  check_mlp(pooled, params, norms, eps);
  STD_TORCH_CHECK(grads.size() == 9, "grads: expected 9 tensors, got ", grads.size());
  const int64_t n = pooled.size(0), c = pooled.size(1), h = params[0].size(0);
  const int64_t inner = norms[0] ? h : 0, outer = norms[2] ? c : 0;
  for (const Tensor& t : grads) check_tensor(t, "grads"), check_contiguous(t, "grads");
  if (!absent(grads[0])) check_shape(grads[0], "dpooled", {n, c});
  check_shape(grads[1], "dweight0", {h, c}), check_shape(grads[2], "dbias0", {h});
  check_shape(grads[3], "dweight1", {c, h}), check_shape(grads[4], "dbias1", {c});
  check_shape(grads[5], "dhidden_gamma", {inner}), check_shape(grads[6], "dhidden_beta", {inner});
  check_shape(grads[7], "dgamma", {outer}), check_shape(grads[8], "dbeta", {outer});
  auto run = [&](auto tag) {
    using A = decltype(tag);
    Arena arena;
    Mlp<A> m = read_mlp<A>(pooled, params, norms, eps, arena);
    backward(m, dlogits, kept, grads, arena);
  };
  if (pooled.numel() == 0) return;
  if (wide_type(pooled) == ScalarType::Double) run(double{});
  else run(float{});
}

} // namespace bam
