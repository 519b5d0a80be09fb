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

} // namespace bam
