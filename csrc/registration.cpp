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
}

STABLE_TORCH_LIBRARY_IMPL(bam_kernels_cpp, CompositeExplicitAutograd, m) {
  m.impl("abi_version", TORCH_BOX(&abi_version));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
}

STABLE_TORCH_LIBRARY_IMPL(bam_kernels_cpp, CPU, m) {
  m.impl("bam_forward", TORCH_BOX(&bam::bam_forward));
}

#if __has_include(<Python.h>)
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
