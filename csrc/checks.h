// Checks of every tensor before a pointer of it is taken: what it is called, what was expected of
// it, what came. They guard the raw operators; `bam_kernels.functional` has checked before.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <string>

namespace bam {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const int64_t* sizes, int64_t dim) {
  std::string text = "[";
  for (int64_t i = 0; i < dim; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline std::string dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    default: return "another dtype (" + std::to_string(int(type)) + ")";
  }
}

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
      type == ScalarType::BFloat16;
}

inline void check_tensor(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.defined(), name, ": expected a tensor, got none");
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a tensor on the CPU, got one on another device");
  STD_TORCH_CHECK(
      is_supported(t.scalar_type()), name,
      ": expected float64, float32, float16 or bfloat16, got ", dtype_text(t.scalar_type()));
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType expected) {
  STD_TORCH_CHECK(
      t.scalar_type() == expected, name, ": expected ", dtype_text(expected), ", got ",
      dtype_text(t.scalar_type()));
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
  const auto found = t.sizes();
  bool same = found.size() == sizes.size();
  size_t i = 0;
  for (int64_t size : sizes) same = same && found[i++] == size;
  STD_TORCH_CHECK(
      same, name, ": expected shape ", shape_text(sizes.begin(), int64_t(sizes.size())), ", got ",
      shape_text(found.data(), int64_t(found.size())));
}

inline void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, got other strides");
}

} // namespace bam
