// What the tests see of the kernels' insides; built by the tests, never shipped. The functions
// write into arrays that they are given, which must be of the types and sizes that they say.
#include <pybind11/stl.h>

#include <cstring>
#include <optional>

#include "arrays.h"
#include "cpu/kernels.h"
#include "internals.h"
#include "launch.h"

namespace py = pybind11;

namespace {

using bam::Internals;
using bam::Tables;

using bam::Array;
using bam::check;
using bam::is_dense;

template <class T>
int64_t stride(const Array<T>& a, int axis) {
  check(a.strides(axis) % int64_t(sizeof(T)) == 0, "expected strides of whole elements");
  return a.strides(axis) / int64_t(sizeof(T));
}

template <class T, class U>
void check_lines(const Array<T>& a, const Array<U>& b) {
  check(
      is_dense(a, 1) && is_dense(b, 1) && a.size() == b.size(), "expected dense [n] of one length");
}

struct InstructionSet {
  const Tables* tables;
  const Internals* internals;

  template <class A>
  const bam::WideKernels<A>& wide() const {
    if constexpr (std::is_same_v<A, float>) return *tables->wide32;
    else return *tables->wide64;
  }
  template <class A>
  const bam::Arithmetic<A>& arithmetic() const {
    if constexpr (std::is_same_v<A, float>) return *internals->f32;
    else return *internals->f64;
  }
  template <class S>
  const bam::Kernels<S>& kernels() const {
    if constexpr (std::is_same_v<S, float>) return *tables->f32;
    else if constexpr (std::is_same_v<S, double>) return *tables->f64;
    else if constexpr (std::is_same_v<S, bam::bf16>) return *tables->bf16_;
    else return *tables->f16_;
  }
};

// The launchers' functions run on the tables that are chosen in this module, which are its own.
class Chosen {
 public:
  explicit Chosen(const InstructionSet& s) { bam::choose_tables(s.tables->name); }
  ~Chosen() { bam::choose_tables("auto"); }
};

// A storage type's elements as numpy has them: half types by their bits.
template <class S>
using Bits = std::conditional_t<sizeof(S) == 2, uint16_t, S>;

template <class S>
void define_conversions(py::class_<InstructionSet>& c, const char* widen, const char* narrow) {
  using A = bam::AccOf<S>;
  const auto from = py::arg("from").noconvert(), out = py::arg("out").noconvert();
  c.def(
      widen,
      [](const InstructionSet& s, const Array<Bits<S>>& from, Array<A> out) {
        check_lines(from, out);
        s.kernels<S>().widen(
            reinterpret_cast<const S*>(from.data()), out.mutable_data(), from.size());
      },
      from, out);
  c.def(
      narrow,
      [](const InstructionSet& s, const Array<A>& from, Array<Bits<S>> out) {
        check_lines(from, out);
        s.kernels<S>().narrow(
            from.data(), reinterpret_cast<S*>(out.mutable_data()), from.size());
      },
      from, out);
}

template <class A, class F>
void define_function(py::class_<InstructionSet>& c, const char* name, F pick) {
  c.def(
      name,
      [pick](const InstructionSet& s, const Array<A>& x, Array<A> out) {
        check_lines(x, out);
        pick(s)(x.data(), out.mutable_data(), x.size());
      },
      py::arg("x").noconvert(), py::arg("out").noconvert());
}

// out [rows][n] (+)= the sum over terms of a [terms][rows][k] b [terms][k][n], n whole vectors.
template <class A>
void product(
    const InstructionSet& s, const Array<A>& a, const Array<A>& b, Array<A> out, bool accumulate) {
  const int64_t lanes = s.wide<A>().lanes;
  check(
      a.ndim() == 3 && b.ndim() == 3 && out.ndim() == 2 && a.shape(0) == b.shape(0) &&
          a.shape(2) == b.shape(1) && out.shape(0) == a.shape(1) && out.shape(1) == b.shape(2),
      "expected a [terms, rows, k], b [terms, k, n] and out [rows, n]");
  check(out.shape(1) % lanes == 0, "expected whole vectors");
  check(
      stride(out, 1) == 1 && (b.size() == 0 || stride(b, 2) == 1),
      "expected dense rows of b and out");
  std::vector<bam::Term<A>> terms;
  for (int64_t i = 0; i < a.shape(0); ++i)
    terms.push_back({a.data() + i * stride(a, 0), b.data() + i * stride(b, 0)});
  s.wide<A>().product(
      {out.shape(0), out.shape(1) / lanes, terms.data(), a.shape(0), a.shape(2), stride(a, 1),
       stride(a, 2), stride(b, 1), out.mutable_data(), stride(out, 0), accumulate});
}

// out [length][stored] = from [rows][length]^T, and zeros.
template <class A>
void transpose(const InstructionSet& s, const Array<A>& from, Array<A> out) {
  check(
      from.ndim() == 2 && out.ndim() == 2 && out.shape(0) == from.shape(1) &&
          out.shape(1) >= from.shape(0),
      "expected from [rows, length] and out [length, rows or more]");
  check(stride(from, 1) == 1 && stride(out, 1) == 1, "expected dense rows");
  s.wide<A>().transpose(
      from.data(), stride(from, 0), from.shape(0), from.shape(1), out.mutable_data(),
      stride(out, 0), out.shape(1));
}

// out [outs] = relu?(w [outs][ins] x [ins] * scale [outs] + shift [outs])
template <class A>
void linear(
    const InstructionSet& s, const Array<A>& w, const Array<A>& x,
    const std::optional<Array<A>>& scale, const std::optional<Array<A>>& shift, bool relu,
    Array<A> out) {
  check(
      is_dense(w, 2) && is_dense(x, 1) && is_dense(out, 1) && w.shape(0) == out.size() &&
          w.shape(1) == x.size(),
      "expected dense w [outs, ins], x [ins] and out [outs]");
  for (const auto& each : {scale, shift})
    check(!each || (is_dense(*each, 1) && each->size() == out.size()), "expected dense [outs]");
  s.kernels<A>().linear(
      w.data(), x.data(), w.shape(0), w.shape(1), scale ? scale->data() : nullptr,
      shift ? shift->data() : nullptr, relu, out.mutable_data());
}

// The same, with column k of `from` in out [j][i], k = i * period + j: [period][length / period].
template <class A>
void transpose_taps(const InstructionSet& s, const Array<A>& from, Array<A> out) {
  check(
      from.ndim() == 2 && out.ndim() == 3 && out.shape(0) > 0 &&
          out.shape(0) * out.shape(1) >= from.shape(1) &&
          out.shape(0) * (out.shape(1) - 1) < from.shape(1) && out.shape(2) >= from.shape(0),
      "expected from [rows, length] and out [period, length / period, rows or more]");
  check(stride(from, 1) == 1 && stride(out, 2) == 1, "expected dense rows");
  s.wide<A>().transpose_taps(
      from.data(), stride(from, 0), from.shape(0), from.shape(1), out.mutable_data(),
      out.shape(0), stride(out, 0), stride(out, 1), out.shape(2));
}

// Weights [rows][k] as [k][ld] and [h][h][9] as [9][h][ld], packed together.
template <class A>
void pack(
    const InstructionSet& s, const std::vector<std::pair<Array<A>, Array<A>>>& weights,
    bool gradient, bool by_output, bool threads) {
  for (const auto& [w, out] : weights) {
    const int axes = int(w.ndim());
    const int64_t rows = w.shape(0);
    const bool same = (axes == 2 || axes == 3) && is_dense(w, axes) && is_dense(out, axes) &&
        out.shape(0) == w.shape(axes - 1) && out.shape(axes - 1) >= rows;
    check(
        same && (axes == 2 || (w.shape(2) == 9 && w.shape(1) == rows && out.shape(1) == rows)),
        "expected dense w [rows, k] and out [k, ld], or w [h, h, 9] and out [9, h, ld]");
  }
  const Chosen chosen(s);
  bam::Arena arena;
  bam::Packer<A> packer(arena);
  std::vector<const A*> packed;
  for (const auto& [w, out] : weights) {
    const int64_t rows = w.shape(0), ld = out.shape(w.ndim() - 1);
    packed.push_back(
        w.ndim() == 2 ? packer.matrix(w.data(), rows, w.shape(1), ld)
                      : packer.conv(w.data(), rows, ld, gradient, by_output));
  }
  packer.run(threads);
  for (size_t i = 0; i < weights.size(); ++i) {
    Array<A> out = weights[i].second;
    std::memcpy(out.mutable_data(), packed[i], size_t(out.nbytes()));
  }
}

template <class A>
void define_wide(py::class_<InstructionSet>& c, const char* lanes) {
  c.def_property_readonly(lanes, [](const InstructionSet& s) { return s.wide<A>().lanes; });
  using Set = const InstructionSet&;
  define_function<A>(c, "exp", [](Set s) { return s.arithmetic<A>().exp; });
  define_function<A>(c, "reciprocal", [](Set s) { return s.arithmetic<A>().reciprocal; });
  define_function<A>(c, "relu", [](Set s) { return s.arithmetic<A>().relu; });
  define_function<A>(c, "exp_negative", [](Set s) { return s.wide<A>().exp_negative; });
  define_function<A>(c, "sigmoid", [](Set s) { return s.wide<A>().sigmoid; });
  define_function<A>(c, "sigmoid_slope", [](Set s) { return s.wide<A>().sigmoid_slope; });
  auto array = [](const char* name) { return py::arg(name).noconvert(); };
  c.def(
      "maximum",
      [](Set s, const Array<A>& a, const Array<A>& b, Array<A> out) {
        check_lines(a, b), check_lines(a, out);
        s.arithmetic<A>().maximum(a.data(), b.data(), out.mutable_data(), a.size());
      },
      array("a"), array("b"), array("out"));
  c.def("product", product<A>, array("a"), array("b"), array("out"), py::arg("accumulate"));
  c.def("transpose", transpose<A>, array("from"), array("out"));
  c.def(
      "linear", linear<A>, array("w"), array("x"), array("scale"), array("shift"), py::arg("relu"),
      array("out"));
  c.def("transpose_taps", transpose_taps<A>, array("from"), array("out"));
  c.def(
      "pack", pack<A>, array("weights"), py::arg("gradient"), py::arg("by_output"),
      py::arg("threads"));
}

// An arena that lasts as long as a `with`.
struct Scratch {
  std::optional<bam::Arena> arena;

  // n bytes and the room behind them.
  py::memoryview take(int64_t n, bool zeros) {
    check(arena.has_value(), "expected to be inside of `with`");
    char* p = zeros ? arena->zeros<char>(n) : arena->take<char>(n);
    return py::memoryview::from_memory(p, n + 64);
  }
};

} // namespace

PYBIND11_MODULE(bam_kernels_cpp_testing, m) {
  m.doc() = "The C++ kernels' insides, for tests.";

  py::class_<InstructionSet> c(m, "InstructionSet");
  c.def_property_readonly("name", [](const InstructionSet& s) { return s.tables->name; });
  define_conversions<float>(c, "widen", "narrow");
  define_conversions<double>(c, "widen", "narrow");
  define_conversions<bam::bf16>(c, "widen_bfloat16", "narrow_bfloat16");
  define_conversions<bam::f16>(c, "widen_float16", "narrow_float16");
  define_wide<float>(c, "float32_lanes");
  define_wide<double>(c, "float64_lanes");

  // By name, those that this build and this processor have.
  py::dict sets;
  const std::pair<const Tables*, const Internals*> all[] = {
      {bam::tables_baseline(), bam::internals_baseline()},
      {bam::tables_avx2(), bam::internals_avx2()},
      {bam::tables_avx512(), bam::internals_avx512()}};
  for (const auto& [tables, internals] : all)
    if (tables && internals) sets[tables->name] = InstructionSet{tables, internals};
  m.attr("instruction_sets") = sets;
  bam::define_amx(m);

  py::class_<Scratch>(m, "Arena")
      .def(py::init<>())
      .def(
          "__enter__",
          [](Scratch& s) -> Scratch& {
            s.arena.emplace();
            return s;
          },
          py::return_value_policy::reference)
      .def("__exit__", [](Scratch& s, const py::args&) { s.arena.reset(); })
      .def("take", &Scratch::take, py::arg("n"), py::arg("zeros") = false);
}
