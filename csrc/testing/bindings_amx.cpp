// What the tests see of the matrix units: packing, and each kernel alone. bfloat16 by its bits.
#include "cpu/amx.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "arrays.h"

namespace py = pybind11;

namespace bam {
namespace {

using Halves = Array<uint16_t>;
using Floats = Array<float>;

const bf16* read(const Halves& a) { return reinterpret_cast<const bf16*>(a.data()); }
bf16* write(Halves& a) { return reinterpret_cast<bf16*>(a.mutable_data()); }

int64_t tiles(int64_t n, int64_t tile) { return (n + tile - 1) / tile; }

struct Units {
  const Amx* amx;
};

using Pack = void (*)(const bf16*, int64_t, int64_t, int64_t, int64_t, int64_t, bf16*);

// w [rows][k] into out, for `channels` rows; of the tiles along k those in [t0, t1).
void pack_matrix(Pack pack, const Halves& w, int64_t channels, int64_t t0, int64_t t1, Halves out) {
  check(is_dense(w, 2) && is_dense(out, 1), "expected dense w [rows, k] and out [n]");
  check(
      channels % kTileDepth == 0 && w.shape(0) <= channels &&
          out.size() == tiles(w.shape(1), kTileDepth) * channels * kTileDepth && 0 <= t0 &&
          t0 <= t1 && t1 <= tiles(w.shape(1), kTileDepth),
      "expected whole depths of channels, an out of all tiles, and tiles along k");
  pack(read(w), w.shape(0), w.shape(1), channels, t0, t1, write(out));
}

void pack_conv(
    const Units& u, const Halves& w, int64_t channels, int64_t t0, int64_t t1, Halves out) {
  check(is_dense(w, 3) && is_dense(out, 1), "expected dense w [h, h, 9] and out [n]");
  check(
      channels % kTileDepth == 0 && w.shape(0) == w.shape(1) && w.shape(2) == 9 &&
          w.shape(0) <= channels && out.size() == 9 * channels * channels && 0 <= t0 && t0 <= t1 &&
          t1 <= channels / kTile,
      "expected whole depths of channels, an out of all tiles, and tiles along the outputs");
  u.amx->pack_conv(read(w), w.shape(0), channels, t0, t1, write(out));
}

// A map and a norm, as all that write hidden channels take them.
struct Layer {
  AmxMap map;
  AmxFinish finish;

  Layer(
      int64_t height, int64_t width, int64_t dilation, int64_t channels, int64_t hidden,
      const std::optional<Floats>& scale, const std::optional<Floats>& shift, bool relu)
      : map(height, width, dilation, channels),
        finish{
            scale ? scale->data() : nullptr, shift ? shift->data() : nullptr, relu, hidden} {
    check(
        channels % kTileDepth == 0 && hidden <= channels && height > 0 && width > 0 && dilation > 0,
        "expected whole depths of channels and no more hidden ones, and sizes above zero");
    for (const auto& each : {scale, shift})
      check(!each || (is_dense(*each, 1) && each->size() == channels), "expected dense [channels]");
  }
};

// The reduction of one sample x [C][P] or, channels_last, [P][C], into a map; pool [C] is added to.
void reduce(
    const Units& u, const Halves& x, const Halves& weight, const Layer& layer, bool channels_last,
    int64_t parts, std::optional<Floats> pool, Halves map) {
  check(is_dense(x, 2) && is_dense(weight, 1) && is_dense(map, 1), "expected dense arrays");
  const int64_t c = x.shape(channels_last ? 1 : 0), p = x.shape(channels_last ? 0 : 1);
  check(
      p == layer.map.height * layer.map.width && map.size() == layer.map.size() && parts > 0 &&
          weight.size() == tiles(c, kTileDepth) * layer.map.channels * kTileDepth &&
          (!pool || (is_dense(*pool, 1) && pool->size() == c)),
      "expected x, weight, pool and map of one size");
  std::vector<bf16> scratch(u.amx->reduce_scratch(c));
  AmxReduce r{read(x), channels_last ? c : p, c, read(weight)};
  float* to = pool ? pool->mutable_data() : nullptr;
  if (channels_last) {
    u.amx->reduce_columns(r, layer.map, layer.finish, 0, p, write(map), to, scratch.data());
    return;
  }
  // In parts of the channels, whose sums are added up.
  const int64_t size = tiles(p, kTile) * layer.map.channels / kTile * kTileSums;
  const int64_t depths = tiles(c, kTileDepth);
  std::vector<float> sums(parts * size);
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t c0 = i * depths / parts * kTileDepth;
    const int64_t c1 = std::min(c, (i + 1) * depths / parts * kTileDepth);
    AmxReduce some = r;
    some.x += c0 * p, some.channels = c1 - c0, some.weight += c0 * layer.map.channels;
    u.amx->reduce_rows(
        some, layer.map, 0, p, sums.data() + i * size, to ? to + c0 : nullptr, scratch.data());
  }
  u.amx->finish(
      sums.data(), parts, size, layer.map, layer.finish, 0, tiles(p, kTile), write(map));
}

// A dilated convolution of rows [y0, y1) from one map into another, or into logits [H][W].
void conv(
    const Units& u, const Halves& in, const Halves& weight, const Layer& layer, int64_t dilation,
    int64_t y0, int64_t y1, std::optional<Halves> out, const std::optional<Floats>& project,
    std::optional<Floats> logits) {
  const AmxMap& map = layer.map;
  check(
      is_dense(in, 1) && in.size() == map.size() && is_dense(weight, 1) &&
          weight.size() == 9 * map.channels * map.channels && 0 <= y0 && y0 <= y1 &&
          y1 <= map.height && (!out || (is_dense(*out, 1) && out->size() == map.size())) &&
          project.has_value() == logits.has_value() &&
          (!project || (is_dense(*project, 1) && project->size() == map.channels)) &&
          (!logits || (is_dense(*logits, 2) && logits->size() == map.height * map.width)),
      "expected in, weight, out, project and logits of the map's size");
  u.amx->conv(
      {read(in), out ? write(*out) : nullptr, read(weight), dilation,
       project ? project->data() : nullptr, logits ? logits->mutable_data() : nullptr},
      map, layer.finish, y0, y1);
}

} // namespace

void define_amx(py::module_& m) {
  auto array = [](const char* name) { return py::arg(name).noconvert(); };
  auto optional = [](const char* name) { return py::arg(name).noconvert().none(true); };
  py::class_<Layer>(m, "AmxLayer")
      .def(
          py::init<
              int64_t, int64_t, int64_t, int64_t, int64_t, const std::optional<Floats>&,
              const std::optional<Floats>&, bool>(),
          py::arg("height"), py::arg("width"), py::arg("dilation"), py::arg("channels"),
          py::arg("hidden"), optional("scale"), optional("shift"), py::arg("relu"),
          py::keep_alive<1, 7>(), py::keep_alive<1, 8>())
      .def_property_readonly("size", [](const Layer& l) { return l.map.size(); })
      .def_property_readonly("row", [](const Layer& l) { return l.map.row(); })
      .def_property_readonly("pad", [](const Layer& l) { return l.map.pad; });
  const auto t0 = py::arg("t0"), t1 = py::arg("t1"), channels = py::arg("channels");
  py::class_<Units>(m, "Amx")
      .def(
          "pack_rows",
          [](const Units& u, const Halves& w, int64_t channels, int64_t t0, int64_t t1, Halves out) {
            pack_matrix(u.amx->pack_rows, w, channels, t0, t1, out);
          },
          array("w"), channels, t0, t1, array("out"))
      .def(
          "pack_columns",
          [](const Units& u, const Halves& w, int64_t channels, int64_t t0, int64_t t1, Halves out) {
            pack_matrix(u.amx->pack_columns, w, channels, t0, t1, out);
          },
          array("w"), channels, t0, t1, array("out"))
      .def("pack_conv", pack_conv, array("w"), channels, t0, t1, array("out"))
      .def(
          "reduce", reduce, array("x"), array("weight"), py::arg("layer"), py::arg("channels_last"),
          py::arg("parts"), optional("pool"), array("map"))
      .def(
          "conv", conv, array("in"), array("weight"), py::arg("layer"), py::arg("dilation"),
          py::arg("y0"), py::arg("y1"), optional("out"), optional("project"), optional("logits"));
  const Amx* amx = amx_units();
  m.attr("amx") = amx ? py::cast(Units{amx}) : py::none();
}

} // namespace bam
