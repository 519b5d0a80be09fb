// What the tests' bindings take: numpy arrays as they are.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace bam {

// One of another dtype is refused, never copied.
template <class T>
using Array = pybind11::array_t<T>;

inline void check(bool right, const char* what) {
  if (!right) throw pybind11::value_error(what);
}

template <class T>
bool is_dense(const Array<T>& a, int axes) {
  return a.ndim() == axes && (a.flags() & pybind11::array::c_style);
}

// The matrix units' functions as a class, where the processor has them; else None.
void define_amx(pybind11::module_& m);

} // namespace bam
