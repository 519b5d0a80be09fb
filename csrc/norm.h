// A batch norm of training, as both branches have it.
#pragma once

#include <cmath>

#include "launch.h"

namespace bam {

template <class A>
struct Norm {
  bool exists = false, batch = false;  // whether it takes the batch's statistics
  const A *gamma = nullptr, *beta = nullptr;
  double eps = 0;
  const A *mean = nullptr, *variance = nullptr;
  // From mean and variance: z -> (z - mean) * rstd, and (z - mean) * scale + beta = z * scale + shift.
  A *rstd = nullptr, *scale = nullptr, *shift = nullptr;

  void make_room(int64_t width, Arena& arena) {
    rstd = arena.take<A>(width), scale = arena.take<A>(width), shift = arena.take<A>(width);
  }
  void settle(int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
      rstd[i] = A(1) / std::sqrt(variance[i] + A(eps));
      scale[i] = rstd[i] * (gamma ? gamma[i] : A(1));
      shift[i] = (beta ? beta[i] : A(0)) - mean[i] * scale[i];
    }
  }
};

} // namespace bam
