// What the launchers share: scratch memory, threads, and tensors as the kernels see them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"

namespace bam {

// Scratch memory of the calling thread, given back when the arena ends: a bump allocator over
// blocks that the thread keeps, so that a steady state allocates nothing. Arenas nest.
class Arena {
 public:
  Arena();
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Uninitialised, aligned to 64 bytes, with a vector's width of room behind the end.
  template <class T>
  T* take(int64_t n) {
    return static_cast<T*>(bytes(size_t(n) * sizeof(T) + 64));
  }
  template <class T>
  T* zeros(int64_t n) {
    T* p = take<T>(n);
    std::memset(static_cast<void*>(p), 0, size_t(n) * sizeof(T) + 64);
    return p;
  }

 private:
  void* bytes(size_t n);
  size_t block_, used_;
};

// f(begin, end) over [0, n) in torch's thread pool, or here.
template <class F>
void parallel(bool threads, int64_t n, const F& f) {
  if (n <= 0) return;
  if (!threads || n == 1) f(int64_t(0), n);
  else torch::stable::parallel_for(0, n, 1, f);
}

// The part k of `parts` of [0, n).
inline int64_t part(int64_t k, int64_t parts, int64_t n) { return n * k / parts; }

// x [N, C, H, W] as N x C x P. Either positions or, channels_last, channels are dense.
struct View {
  int64_t n, c, h, w, p;
  bool channels_last;
  int64_t sample, line;  // strides, along N and along the axis that is not dense
};

View view_of(const Tensor& x, const char* name);
// t's strides, which must walk as `like` does.
View view_like(const Tensor& t, const char* name, const View& like);

// Beyond it twice the dilation would come near what 64 bits hold.
constexpr int64_t kMostDilation = 65536;

// Channels in whole vectors.
inline int64_t whole_vectors(int64_t channels, int lanes) {
  return (channels + lanes - 1) / lanes * lanes;
}

template <class S>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr ScalarType value = ScalarType::Float;
};
template <>
struct TypeOf<double> {
  static constexpr ScalarType value = ScalarType::Double;
};
template <>
struct TypeOf<bf16> {
  static constexpr ScalarType value = ScalarType::BFloat16;
};
template <>
struct TypeOf<f16> {
  static constexpr ScalarType value = ScalarType::Half;
};

// Calls f with a value of the storage type.
template <class F>
void with_type(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bf16{});
    default: return f(f16{});
  }
}

template <class S>
const S* data(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}
template <class S>
S* mutable_data(const Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}

inline bool absent(const Tensor& t) { return t.numel() == 0; }

// A parameter's values, dense and in the accumulator's type: its own memory where that is so
// already, else a copy in the arena. Null where it is absent (no elements). It must have the shape,
// at most four axes; a 1x1 convolution's weight may stand for a matrix.
template <class A>
const A* values(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, Arena& arena);

// The same in bfloat16: rounded where a wider type has them.
const bf16* bf16_values(
    const Tensor& t, const char* name, std::initializer_list<int64_t> shape, Arena& arena);

// n values into a dense result of any dtype.
template <class A>
void write_values(const A* from, const Tensor& to, int64_t n);

// gamma / sqrt(var + eps) and beta - mean * scale, with a bias in front of the norm folded in.
template <class A>
struct Affine {
  const A* scale = nullptr;
  const A* shift = nullptr;
};

// v [n] with zeros up to ld behind it; null stays null.
template <class A>
const A* padded(const A* v, int64_t n, int64_t ld, Arena& arena);

// Weights as the kernels take them: room is given at once, and all are written by `run`, together.
template <class A>
class Packer {
 public:
  explicit Packer(Arena& arena) : arena_(arena) {}
  // w [rows][k] as [k][ld].
  const A* matrix(const A* w, int64_t rows, int64_t k, int64_t ld);
  // The weight [h out][h in][9] of a convolution as [9][h in][ld out]; of its gradient's, the taps
  // turned round, as [9][h out][ld in]. With `by_output` a thread has its part of the outputs.
  const A* conv(
      const A* w, int64_t h, int64_t ld, bool gradient = false, bool by_output = false);
  void run(bool threads);

 private:
  enum class Kind { matrix, conv, conv_by_output, gradient };
  struct Job {
    Kind kind;
    const A* from;
    A* to;
    int64_t rows, k, ld, count, block;  // of k, or of channels: how many, and so many at a time
  };
  Arena& arena_;
  std::vector<Job> jobs_;
};

// The same for matrix units, for maps of `channels` channels.
class TilePacker {
 public:
  TilePacker(const Amx* units, int64_t channels, Arena& arena)
      : units_(units), channels_(channels), arena_(arena) {}
  // w [rows][k], on the right of a product or on its left.
  const bf16* matrix(const bf16* w, int64_t rows, int64_t k, bool right);
  const bf16* conv(const bf16* w, int64_t h);  // [h out][h in][9]
  void run(bool threads);

 private:
  enum class Kind { left, right, conv };
  struct Job {
    Kind kind;
    const bf16* from;
    bf16* to;
    int64_t rows, k, tiles;
  };
  const Amx* units_;
  int64_t channels_;
  Arena& arena_;
  std::vector<Job> jobs_;
};

// One sample of a small map as a hidden map [P][ld], and back.
template <class A>
void load_hidden(const Tensor& t, const View& v, int64_t n, A* out, int64_t ld, Arena& arena);
template <class A>
void store_hidden(
    const A* from, int64_t ld, const Tensor& t, const View& v, int64_t n, int64_t p0, int64_t p1,
    Arena& arena);

// The gate's vectors for one sample, from logits in the accumulator's type; `c_room` and `s_room`
// hold what they become.
template <class A>
Gate<A> prepare_gate(
    Combine combine, bool residual, bool channels_last, const A* c, int64_t channels, const A* s,
    int64_t positions, A* c_room, A* s_room);

// Whether exp(-c) * exp(-s) stays finite for all pairs.
template <class A>
bool can_factor(const A* c, int64_t channels, const A* s, int64_t positions);

} // namespace bam
