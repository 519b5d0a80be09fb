// The kernels, as the launchers see them: one table of functions per instruction set and dtype.
#pragma once

#include <type_traits>

#include "amx.h"
#include "types.h"

namespace bam {

template <class S>
using AccOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

// A pair of factors of `Product`: scalars, and rows of vectors.
template <class A>
struct Term {
  const A *a, *b;
};

// out[r][v] (+)= sum over terms and k of a[r * row + k * step] * b[k * b_step + v]
template <class A>
struct Product {
  int64_t rows, vecs;  // of out; a vector has `lanes` values
  const Term<A>* terms;
  int64_t count, k;  // terms, and how long each is
  int64_t row, step, b_step;
  A* out;
  int64_t out_row;
  bool accumulate;
};

// Hidden maps are [positions][ld] in the accumulator's type, ld channels being whole vectors; so are
// the vectors by hidden channel, which are zero behind the last one.

// y = relu?(W x * scale + shift)
template <class S>
struct Reduce {
  using A = AccOf<S>;
  const S* x;    // one sample
  int64_t line;  // from channel to channel or, channels_last, from position to position
  bool channels_last;
  int64_t channels, hidden;  // hidden may be 0: pooling alone
  const A* weight;           // [channels][ld]
  int64_t ld;
  A* out;
  const A *scale, *shift;  // or null
  bool relu;
};

// A dilated 3x3 convolution of one sample, y = relu?(conv * scale + shift), zero where `act`, if
// given, is not above 0; and where `project` is given, logits = project . y.
template <class A>
struct Conv {
  const A* in;
  A* out;
  const A* weight;  // [9][hidden in][ld]
  const A *scale, *shift;  // or null
  bool relu;
  const A* act;
  int64_t height, width, dilation, hidden, ld;
  const A* project;  // or null
  A* logits;
};

// dx = dout * (residual + M) + W^T dreduced + dpooled, of one sample; dout, dreduced and dpooled may
// be null.
template <class S>
struct InputGradient {
  using A = AccOf<S>;
  const S* dout;
  S* dx;
  int64_t dout_line, dx_line, channels, hidden;
  const A* dpooled;
  const A* dreduced;  // [hidden][ld] planar or, channels_last, a hidden map
  int64_t ld;
  const A* weight;  // [channels][hidden] or, channels_last, panels [channels / kPanel][hidden][kPanel]
};

constexpr int64_t kPanel = 64;

// dW = x dreduced^T over all samples.
template <class S>
struct WeightGradient {
  const S* x;
  int64_t sample, line, samples, positions;
  bool channels_last;
  const AccOf<S>* dreduced;  // hidden maps
  int64_t ld;
};

template <class A>
struct Gate {
  Map map;
  bool residual;
  bool channels_last;
  const A* by_channel;
  const A* by_position;
};

constexpr int64_t kWeightChannels = 48;  // whole tiles of `product`

template <class S>
struct Kernels {
  using A = AccOf<S>;
  int lanes;  // of a vector of A
  int64_t (*reduce_scratch)(int64_t C);
  // Positions [p0, p1); pool [C] is added to, where given.
  void (*reduce)(const Reduce<S>& r, int64_t p0, int64_t p1, A* pool, A* scratch);
  // out and x: [C0, C1) x [p0, p1) of one sample.
  void (*gate)(
      const Gate<A>& g, const S* x, int64_t x_stride, S* out, int64_t out_stride, int64_t c0,
      int64_t c1, int64_t p0, int64_t p1);
  // dchannel[c] += sum over p, dspatial[p] += sum over c, of the logits' gradients. channel and
  // spatial are the logits; with `factored` exp(-logit), with sigmoid_sum sigmoid'(logit).
  void (*gate_gradient)(
      Combine combine, bool has_channel, bool has_spatial, bool factored, bool channels_last,
      const S* dout, int64_t dout_stride, const S* x, int64_t x_stride, const A* channel, const A* spatial,
      A* dchannel, A* dspatial, int64_t c0, int64_t c1, int64_t p0, int64_t p1);
  int64_t (*gradient_scratch)(int64_t C);
  void (*input_gradient)(
      const Gate<A>& g, const InputGradient<S>& r, int64_t p0, int64_t p1, A* scratch);
  // Channels [c0, c1) of dw [C][ld], at most kWeightChannels.
  int64_t (*weight_gradient_scratch)();
  void (*weight_gradient)(
      const WeightGradient<S>& r, int64_t c0, int64_t c1, A* dw, A* scratch);
  void (*widen)(const S* from, A* to, int64_t n);
  void (*narrow)(const A* from, S* to, int64_t n);
  // y[i] = relu?((sum over k of w[i][k] * x[k]) * scale[i] + shift[i])
  void (*linear)(
      const S* w, const A* x, int64_t outs, int64_t ins, const A* scale, const A* shift, bool relu,
      A* y);
};

// What does not depend on the storage type.
template <class A>
struct WideKernels {
  int lanes;
  // to[k * to_row + r] = from[r * from_row + k] for r < rows, k < length; 0 for rows <= r < stored.
  void (*transpose)(
      const A* from, int64_t from_row, int64_t rows, int64_t length, A* to, int64_t to_row,
      int64_t stored);
  // The same with k in periods: column k goes to (k / period) * far + (k % period) * near.
  void (*transpose_taps)(
      const A* from, int64_t from_row, int64_t rows, int64_t length, A* to, int64_t period,
      int64_t near, int64_t far, int64_t stored);
  void (*product)(const Product<A>& product);
  // Rows [row0, row1), of the output channels' vectors [vec0, vec1); the logits are of these alone.
  void (*conv)(const Conv<A>& conv, int64_t row0, int64_t row1, int64_t vec0, int64_t vec1);
  // dw [9][hidden in][ld] += sum over positions of in, shifted by tap, times dz; of inputs [i0, i1).
  // Of `conv` the map and its sizes count.
  void (*conv_weight_gradient)(const Conv<A>& conv, const A* dz, int64_t i0, int64_t i1, A* dw);
  void (*add)(A* to, const A* from, int64_t n);  // whole vectors
  void (*project)(const A* a, int64_t n, int64_t ld, int64_t h, const A* weight, A* logits);
  // Of hidden maps of n positions: out = sum of z, or of (z - mean)^2 where mean is given.
  void (*moments)(const A* z, int64_t n, int64_t ld, const A* mean, A* out);
  // a = relu(z * scale + shift)
  void (*activate)(const A* z, A* a, int64_t n, int64_t ld, const A* scale, const A* shift);
  // du = weight dq, 0 where act <= 0; dweight = sum of dq act. dq is by position.
  void (*project_gradient)(
      const A* dq, const A* act, int64_t n, int64_t ld, const A* weight, A* du, A* dweight);
  // sums = sum of du, products = sum of du (z - mean) rstd
  void (*norm_sums)(
      const A* du, const A* z, int64_t n, int64_t ld, const A* mean, const A* rstd, A* sums,
      A* products);
  // du = scale (du - mean_gradient - (z - mean) rstd mean_product), the last two given or not
  void (*norm_gradient)(
      A* du, const A* z, int64_t n, int64_t ld, const A* mean, const A* rstd, const A* scale,
      const A* mean_gradient, const A* mean_product);
  void (*exp_negative)(const A* from, A* to, int64_t n);  // exp(-x)
  void (*sigmoid)(const A* from, A* to, int64_t n);
  void (*sigmoid_slope)(const A* from, A* to, int64_t n);  // sigmoid'(x)
};

struct Tables {
  const char* name;
  const Kernels<float>* f32;
  const Kernels<double>* f64;
  const Kernels<bf16>* bf16_;
  const Kernels<f16>* f16_;
  const WideKernels<float>* wide32;
  const WideKernels<double>* wide64;
  const Amx* amx;  // or null
};

// Null where this build or this processor has not got it.
const Tables* tables_baseline();
const Tables* tables_avx2();
const Tables* tables_avx512();
const Tables* tables_amx();

// The best that this processor has, or the one that was chosen by name.
const Tables& tables();
// False where there is none of that name here.
bool choose_tables(const char* name);

template <class S>
const Kernels<S>& kernels() {
  const Tables& t = tables();
  if constexpr (std::is_same_v<S, float>) return *t.f32;
  else if constexpr (std::is_same_v<S, double>) return *t.f64;
  else if constexpr (std::is_same_v<S, bf16>) return *t.bf16_;
  else return *t.f16_;
}
template <class A>
const WideKernels<A>& wide_kernels() {
  if constexpr (std::is_same_v<A, float>) return *tables().wide32;
  else return *tables().wide64;
}

} // namespace bam
