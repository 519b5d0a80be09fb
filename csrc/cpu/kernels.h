// The kernels, as the launchers see them: one table of functions per instruction set and dtype.
#pragma once

#include <type_traits>

#include "types.h"

namespace bam {

template <class S>
using AccOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Where the reduction's rows go: y = relu?(sum * scale[j] + shift[j]), to padded planes in the
// accumulator's type, or else to a dense map in x's type.
template <class A>
struct ReduceOutput {
  const A* scale;  // or null for 1
  const A* shift;  // or null for 0
  bool relu;
  A* planes;
  const Planes* geometry;
  void* dense;
  int64_t dense_row, dense_column;  // strides along h and along positions; one of them is 1
  bool packed = false;  // whether w is (`pack`); reduce_columns takes none that is
};

// A dilated 3x3 convolution from planes to planes, y = relu?(conv * scale[j] + shift[j]), and where
// `project` [h] is given, logits += project . relu(y).
template <class A>
struct Conv {
  const A* in;
  A* out;           // or null
  const A* weight;  // [h out][h in][9]
  const A* scale;   // or null
  const A* shift;   // or null
  bool relu;
  int64_t hidden;
  const Planes* geometry;
  const void* mask;  // all bits of a word where a position of the span is a pixel, else none
  const A* project;
  A* logits;  // by position of the span
  bool packed = false;  // whether the weight is (`pack`), as [h][9 h]
};

template <class A>
struct Gate {
  Map map;
  bool residual;
  bool channels_last;
  const A* by_channel;
  const A* by_position;
};

constexpr int64_t kWeightChannels = 48;  // three vectors of 16 floats

template <class S>
struct Kernels {
  using A = AccOf<S>;
  // Lanes of a vector of A: `pool` of reduce_rows is [C][lanes], of reduce_columns [C].
  int lanes;
  int64_t (*reduce_scratch)(int64_t C, int64_t h);
  int64_t (*gradient_scratch)(int64_t C);
  void (*reduce_rows)(
      const S* x, int64_t stride, int64_t C, int64_t p0, int64_t p1, const A* w, int64_t h,
      const ReduceOutput<A>& out, A* pool, A* scratch);
  void (*reduce_columns)(
      const S* x, int64_t stride, int64_t C, int64_t p0, int64_t p1, const A* w, int64_t h,
      const ReduceOutput<A>& out, A* pool, A* scratch);
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
  // dx = dout * (residual + M) + W^T dreduced + dpooled, of one sample, positions [p0, p1).
  // dreduced [h][ld] is planar; dout, dpooled and dreduced may be null.
  void (*input_gradient)(
      const Gate<A>& g, const S* dout, int64_t dout_stride, S* dx, int64_t dx_stride,
      const A* dpooled, const A* dreduced, int64_t ld, const A* w, int64_t C, int64_t h,
      int64_t p0, int64_t p1, A* scratch);
  // dw [h][C] = dreduced x^T summed over the samples, its channels [c0, c1): at most
  // kWeightChannels. dreduced [N][h][P] is planar.
  int64_t (*weight_gradient_scratch)(int64_t N, int64_t P);
  void (*weight_gradient)(
      bool channels_last, const S* x, int64_t x_sample, int64_t x_stride, const A* dreduced, A* dw,
      int64_t N, int64_t C, int64_t h, int64_t P, int64_t c0, int64_t c1, A* scratch);
  void (*widen)(const S* from, A* to, int64_t n);
  void (*narrow)(const A* from, S* to, int64_t n);
};

// What does not depend on the storage type.
template <class A>
struct WideKernels {
  // The rows of w [rows][k] side by side, as many as the kernels take at a time.
  void (*pack)(const A* w, int64_t rows, int64_t k, A* out);
  // Vectors [v0, v1) of the geometry's.
  void (*conv)(const Conv<A>& conv, int64_t v0, int64_t v1);
  // dw [h][h][9] += sum over the span of dz[o] * in[i], shifted by tap; dz's padding is zero.
  void (*conv_weight_gradient)(
      const A* dz, const A* in, const Planes& g, int64_t h, int64_t o0, int64_t o1, A* dw);
  void (*project)(
      const A* in, const Planes& g, int64_t h, const A* weight, A* logits, int64_t v0, int64_t v1);
  // The two products of matrices, for the small layers.
  // out [rows][n] (+)= a [rows][k] b [k][n]: a by any strides, b's rows dense.
  void (*outer)(
      int64_t rows, int64_t n, int64_t k, const A* a, int64_t row, int64_t step, const A* b,
      int64_t b_step, A* out, int64_t ld, bool accumulate);
  // out [rows][columns] (+)= a [rows][n] b [columns][n]^T, out by any strides.
  void (*inner)(
      int64_t rows, int64_t columns, int64_t n, const A* a, int64_t a_row, const A* b,
      int64_t b_row, A* out, int64_t out_row, int64_t out_column, bool accumulate);
  // Of padded planes, channels [j0, j1): out[j] = sum of z, or of (z - mean)^2 where mean is given.
  void (*moments)(
      const A* z, const Planes& g, const void* mask, const A* mean, int64_t j0, int64_t j1, A* out);
  // a = relu(z * scale + shift)
  void (*activate)(
      const A* z, A* a, const Planes& g, const void* mask, const A* scale, const A* shift,
      int64_t j0, int64_t j1);
  // du = weight dq where act > 0; dweight[j] = sum of dq act. dq is by position of the span.
  void (*project_gradient)(
      const A* dq, const A* act, const Planes& g, const A* weight, A* du, A* dweight, int64_t j0,
      int64_t j1);
  void (*relu_gradient)(A* du, const A* act, const Planes& g, int64_t j0, int64_t j1);
  // sums[j] = sum of du, products[j] = sum of du (z - mean) rstd
  void (*norm_sums)(
      const A* du, const A* z, const Planes& g, const A* mean, const A* rstd, int64_t j0,
      int64_t j1, A* sums, A* products);
  // du = scale (du - mean_gradient - (z - mean) rstd mean_product)
  void (*norm_gradient)(
      A* du, const A* z, const Planes& g, const void* mask, const A* mean, const A* rstd,
      const A* scale, const A* mean_gradient, const A* mean_product, int64_t j0, int64_t j1);
  void (*exp_negative)(const A* from, A* to, int64_t n);  // exp(-x)
  void (*sigmoid)(const A* from, A* to, int64_t n);
  void (*sigmoid_slope)(const A* from, A* to, int64_t n);  // sigmoid'(x)
  // y[i] = relu?((sum over k of w[i][k] * x[k]) * scale[i] + shift[i])
  void (*linear)(
      const A* w, const A* x, int64_t outs, int64_t ins, const A* scale, const A* shift, bool relu,
      A* y);
};

struct Tables {
  const char* name;
  const Kernels<float>* f32;
  const Kernels<double>* f64;
  const Kernels<bf16>* bf16_;
  const Kernels<f16>* f16_;
  const WideKernels<float>* wide32;
  const WideKernels<double>* wide64;
};

// Null where this build or this processor has not got it.
const Tables* tables_baseline();
const Tables* tables_avx2();
const Tables* tables_avx512();

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
