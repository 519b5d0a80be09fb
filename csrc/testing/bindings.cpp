// What the tests see of the kernels' insides; built by the tests, never shipped.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(bam_kernels_cpp_testing, m) { m.doc() = "The C++ kernels' insides, for tests."; }
