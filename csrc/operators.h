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

// x-sized operators of training. What is absent has no elements; results are given, uninitialised.
void pool_reduce(Tensor x, Tensor weight, Tensor bias, Tensor pooled, Tensor reduced);
void gate_forward(Tensor x, Tensor c, Tensor s, Tensor out, int64_t combine, bool residual);
void gate_gradient(Tensor dout, Tensor x, Tensor c, Tensor s, Tensor dc, Tensor ds, int64_t combine);
void input_gradient(
    Tensor dout, Tensor x, Tensor c, Tensor s, Tensor dpooled, Tensor dreduced, Tensor weight,
    Tensor dx, Tensor dweight, Tensor dbias, int64_t combine, bool residual);
void update_running(
    std::vector<Tensor> means, std::vector<Tensor> variances, std::vector<Tensor> counters,
    std::vector<Tensor> batch_means, std::vector<Tensor> batch_variances,
    std::vector<int64_t> counts, std::vector<double> momenta);

// The channel branch behind the pooling, one hidden layer. params: weight0, bias0, weight1, bias1, and
// of the hidden and the last norm gamma, beta, mean, variance each. norms: whether each exists and
// whether it takes the batch's statistics. taken: mean and variance of each that does. grads: of
// pooled (or absent), weight0, bias0, weight1, bias1, hidden gamma and beta, gamma, beta.
void channel_forward(
    Tensor pooled, std::vector<Tensor> params, Tensor logits, Tensor kept,
    std::vector<Tensor> taken, std::vector<bool> norms, std::vector<double> eps);
void channel_backward(
    Tensor dlogits, Tensor kept, Tensor pooled, std::vector<Tensor> params,
    std::vector<Tensor> grads, std::vector<bool> norms, std::vector<double> eps);

// The spatial branch behind the reduction; see `bam_kernels.backends.triton` for the arguments.
void spatial_forward(
    Tensor reduced, std::vector<Tensor> weights, std::vector<Tensor> biases, Tensor project_weight,
    Tensor project_bias, std::vector<Tensor> gammas, std::vector<Tensor> betas,
    std::vector<Tensor> means, std::vector<Tensor> variances, Tensor logits, Tensor statistics,
    bool hidden_norm, bool norm, std::vector<bool> batch_stats, std::vector<double> eps,
    int64_t dilation);
void spatial_backward(
    Tensor dlogits, Tensor statistics, Tensor reduced, std::vector<Tensor> weights,
    std::vector<Tensor> biases, Tensor project_weight, Tensor project_bias,
    std::vector<Tensor> gammas, std::vector<Tensor> betas, std::vector<Tensor> means,
    std::vector<Tensor> variances, Tensor dreduced, Tensor dconvolutions, Tensor dprojection,
    Tensor dnorms, bool hidden_norm, bool norm, std::vector<bool> batch_stats,
    std::vector<double> eps, int64_t dilation);

} // namespace bam
