// The raw operators, as registration.cpp registers them. All write into tensors that are given.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/types.h"

namespace bam {

Combine combine_of(int64_t mode);

// params: of each linear layer weight, bias and, where it has a norm, gamma, beta, mean, variance;
// then of the reduction, of each convolution, and of the projection likewise. A tensor without
// elements stands for None. options: combine, residual, linear layers, channel norm_hidden and
// norm_final, spatial, convolutions, dilation, spatial norm_hidden and norm_final, hidden width.
// eps: of the norms, in the same order.
void bam_forward(
    Tensor x, Tensor out, std::vector<Tensor> params, std::vector<int64_t> options,
    std::vector<double> eps);

} // namespace bam
