// The library's version, and an empty module so that Python can import it by name.
#if __has_include(<Python.h>)
#include <Python.h>
#endif
#include <torch/csrc/stable/library.h>

#include <cstdint>

namespace {
int64_t abi_version() { return 1; }
}  // namespace

STABLE_TORCH_LIBRARY(bam_kernels_cpp, m) { m.def("abi_version() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(bam_kernels_cpp, CompositeExplicitAutograd, m) {
  m.impl("abi_version", TORCH_BOX(&abi_version));
}

#if __has_include(<Python.h>)
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
