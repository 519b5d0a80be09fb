// What the launchers and the kernels of every instruction set agree on. No torch header here: the
// kernels are compiled once per instruction set and see plain pointers only.
#pragma once

#include <cstdint>

namespace bam {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class Dtype { f32, f64, bf16, f16 };

// How the map M comes from the vectors `by_channel` [C] and `by_position` [P] that `Gate` holds:
// both are prepared once per sample so that the element-wise part is as short as it can be.
enum class Map {
  factored,    // 1 / (1 + a b), a = exp(-c), b = exp(-s): sigmoid(c + s) without an exponential
  sum,         // sigmoid(a + b): the same where exp(-c) exp(-s) could overflow, or is NaN
  product,     // sigmoid(a b)
  maximum,     // max(a, b) of the two sigmoids
  sigmoid_sum, // a + b of the two sigmoids
  channel,     // a, a sigmoid
  spatial,     // b, a sigmoid
};

enum class Combine { sum, product, maximum, sigmoid_sum };

// A [C, P] map of one sample: dense along P ("rows" are channels) or, channels_last, along C.
template <class S>
struct Sample {
  S* data;
  int64_t stride; // elements from row to row, or from position to position
};

// Zero-padded planes [h][...] of one sample. The right padding of a row is the left padding of the
// next, so that a dilated tap is one constant offset and a row costs W + dilation.
struct Planes {
  int64_t height, width, dilation;
  int64_t pitch;   // from row to row
  int64_t origin;  // of pixel (0, 0) in a plane
  int64_t span;    // from pixel (0, 0) to behind the last one
  int64_t plane;   // from plane to plane
  // How a convolution cuts the span into vectors: `per_row` to a row, each starting with it, or,
  // where that would be more vectors (0), one behind the other across rows and padding.
  int64_t per_row;
  int64_t vectors;
};

} // namespace bam
