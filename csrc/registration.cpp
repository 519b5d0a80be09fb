// Schemas of the raw operators and what computes them; an empty module, so that Python can import
// the library by name. They have no autograd: `bam_kernels.ops` gives it to the operators above.
#if __has_include(<Python.h>)
#include <Python.h>
#endif
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>

#include "cpu/kernels.h"
#include "operators.h"

namespace {
int64_t abi_version() { return 1; }
std::string isa() { return bam::tables().name; }
bool set_isa(std::string name) { return bam::choose_tables(name.c_str()); }
}  // namespace

STABLE_TORCH_LIBRARY(bam_kernels_cpp, m) {
  m.def("abi_version() -> int");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> bool");
  m.def(
      "bam_forward(Tensor x, Tensor(a!) out, Tensor[] params, int[] options, float[] eps) -> ()");
  m.def(
      "pool_reduce(Tensor x, Tensor weight, Tensor bias, Tensor(a!) pooled, Tensor(b!) reduced)"
      " -> ()");
  m.def(
      "gate_forward(Tensor x, Tensor c, Tensor s, Tensor(a!) out, int combine, bool residual)"
      " -> ()");
  m.def(
      "gate_gradient(Tensor dout, Tensor x, Tensor c, Tensor s, Tensor(a!) dc, Tensor(b!) ds,"
      " int combine) -> ()");
  m.def(
      "input_gradient(Tensor dout, Tensor x, Tensor c, Tensor s, Tensor dpooled, Tensor dreduced,"
      " Tensor weight, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias, int combine,"
      " bool residual) -> ()");
  m.def(
      "channel_forward(Tensor pooled, Tensor[] params, Tensor(a!) logits, Tensor(b!) kept,"
      " Tensor(c!)[] taken, bool[] norms, float[] eps) -> ()");
  m.def(
      "channel_backward(Tensor dlogits, Tensor kept, Tensor pooled, Tensor[] params,"
      " Tensor(a!)[] grads, bool[] norms, float[] eps) -> ()");
  m.def(
      "spatial_forward(Tensor reduced, Tensor[] weights, Tensor[] biases, Tensor project_weight,"
      " Tensor project_bias, Tensor[] gammas, Tensor[] betas, Tensor[] means, Tensor[] variances,"
      " Tensor(a!) logits, Tensor(b!) statistics, bool hidden_norm, bool norm, bool[] batch_stats,"
      " float[] eps, int dilation) -> ()");
  m.def(
      "spatial_backward(Tensor dlogits, Tensor statistics, Tensor reduced, Tensor[] weights,"
      " Tensor[] biases, Tensor project_weight, Tensor project_bias, Tensor[] gammas,"
      " Tensor[] betas, Tensor[] means, Tensor[] variances, Tensor(a!) dreduced,"
      " Tensor(b!) dconvolutions, Tensor(c!) dprojection, Tensor(d!) dnorms, bool hidden_norm,"
      " bool norm, bool[] batch_stats, float[] eps, int dilation) -> ()");
  m.def(
      "update_running(Tensor(a!)[] means, Tensor(b!)[] variances, Tensor(c!)[] counters,"
      " Tensor[] batch_means, Tensor[] batch_variances, int[] counts, float[] momenta) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bam_kernels_cpp, CompositeExplicitAutograd, m) {
  m.impl("abi_version", TORCH_BOX(&abi_version));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
}

STABLE_TORCH_LIBRARY_IMPL(bam_kernels_cpp, CPU, m) {
  m.impl("bam_forward", TORCH_BOX(&bam::bam_forward));
  m.impl("pool_reduce", TORCH_BOX(&bam::pool_reduce));
  m.impl("gate_forward", TORCH_BOX(&bam::gate_forward));
  m.impl("gate_gradient", TORCH_BOX(&bam::gate_gradient));
  m.impl("input_gradient", TORCH_BOX(&bam::input_gradient));
  m.impl("channel_forward", TORCH_BOX(&bam::channel_forward));
  m.impl("channel_backward", TORCH_BOX(&bam::channel_backward));
  m.impl("spatial_forward", TORCH_BOX(&bam::spatial_forward));
  m.impl("spatial_backward", TORCH_BOX(&bam::spatial_backward));
  m.impl("update_running", TORCH_BOX(&bam::update_running));
}

#if __has_include(<Python.h>)
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
