// bfloat16 inference on matrix units (Intel AMX): products of tiles, 16 rows of 32 bfloat16 each, into
// 16 x 16 float32. Hidden maps are bfloat16 there, as eager has them; sums, norms and the projection
// stay float32.
#pragma once

#include <algorithm>

#include "types.h"

namespace bam {

constexpr int64_t kTile = 16;         // rows of a tile, and float32 columns of a sum
constexpr int64_t kTileDepth = 32;    // bfloat16 columns: terms of a sum
constexpr int64_t kTileSize = 512;    // bfloat16 values of a tile
constexpr int64_t kTileSums = 256;    // float32 values of a tile of sums

// Where hidden channels lie in a map: [height + 1][pad, width, pad][channels], whole depths of tiles.
// Zero in the pads and in the last row, which stands for those outside; and behind it there is room for
// what its last tile reads.
struct AmxMap {
  int64_t height, width, pad, channels;

  AmxMap(int64_t h, int64_t w, int64_t dilation, int64_t c)
      : height(h), width(w), pad(dilation < w ? dilation : 0), channels(c) {}
  int64_t row() const { return (width + 2 * pad) * channels; }
  int64_t size() const { return (height + 1) * row() + (kTile + 2 * pad) * channels; }
};

// As `Affine`, with the ReLU; both vectors are zero behind `hidden`, and so is the result.
struct AmxFinish {
  const float *scale, *shift;  // [channels of the map], or null
  bool relu;
  int64_t hidden;
};

struct AmxReduce {
  const bf16* x;  // one sample
  int64_t line;   // as in `Reduce`
  int64_t channels;
  const bf16* weight;  // packed by pack_rows or, channels_last, by pack_columns
};

struct AmxConv {
  const bf16* in;
  bf16* out;           // or null
  const bf16* weight;  // packed by pack_conv
  int64_t dilation;
  const float* project;  // of the last convolution, else null
  float* logits;         // [positions], where `project` is given
};

struct Amx {
  // w [rows][k] as tiles [k / 32][channels / 16] of weights, on the left of a product: [16 rows][32 k];
  // and on its right: [16 pairs of k][16 rows][2]. Of the tiles along k those in [t0, t1).
  void (*pack_rows)(
      const bf16* w, int64_t rows, int64_t k, int64_t channels, int64_t t0, int64_t t1, bf16* to);
  void (*pack_columns)(
      const bf16* w, int64_t rows, int64_t k, int64_t channels, int64_t t0, int64_t t1, bf16* to);
  // w [h out][h in][9] as tiles [9][channels / 32 in][channels / 16 out], on the right of a product; of
  // the tiles along the outputs those in [t0, t1).
  void (*pack_conv)(
      const bf16* w, int64_t h, int64_t channels, int64_t t0, int64_t t1, bf16* to);

  int64_t (*reduce_scratch)(int64_t channels);  // bfloat16 values
  // NCHW: tiles [p / 16][channels / 16] of sums [16 hidden][16 positions], of positions [p0, p1), p0
  // being the first of a tile. pool [C] is added to, where given.
  void (*reduce_rows)(
      const AmxReduce& r, const AmxMap& map, int64_t p0, int64_t p1, float* sums, float* pool,
      bf16* scratch);
  // The tiles [t0, t1) of `parts` such arrays, `size` apart, added up, into the map.
  void (*finish)(
      const float* sums, int64_t parts, int64_t size, const AmxMap& map, const AmxFinish& f,
      int64_t t0, int64_t t1, bf16* out);
  // channels_last: positions [p0, p1) into the map at once.
  void (*reduce_columns)(
      const AmxReduce& r, const AmxMap& map, const AmxFinish& f, int64_t p0, int64_t p1, bf16* out,
      float* pool, bf16* scratch);
  // Rows [y0, y1).
  void (*conv)(
      const AmxConv& c, const AmxMap& map, const AmxFinish& f, int64_t y0, int64_t y1);
};

// Null where this build, this processor or this kernel has no matrix units.
const Amx* amx_units();

}  // namespace bam
