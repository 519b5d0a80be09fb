#include "amx.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__AVX512BW__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#if !defined(__clang__)
// As in isa_avx512.cpp.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BAM_ISA amx
#define BAM_BYTES 64
#include "product.h"

// Functions with tiles in them. The compiler knows neither what a tile's load reads nor that it must
// stay behind the stores of that: such functions are never inlined into the ones that store.
#define BAM_TILES __attribute__((target("amx-tile,amx-bf16"), noinline))
#define BAM_TILES_INLINE inline __attribute__((target("amx-tile,amx-bf16"), always_inline))

namespace bam {
namespace BAM_ISA {

namespace {

// --- tiles: 0 to 3 hold sums, two by two; 4 and 5 what is on the left, 6 and 7 on the right ----------

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Config) == 64, "as the processor reads it");
const Config kConfig;

template <int M, int N>
BAM_TILES_INLINE void clear() {
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (M > 1) _tile_zero(2);
  if constexpr (M > 1 && N > 1) _tile_zero(3);
}

// Strides in bytes from row to row.
template <int M, int N>
BAM_TILES_INLINE void multiply(
    const bf16* a0, const bf16* a1, int64_t stride, const bf16* b0, const bf16* b1) {
  _tile_loadd(4, a0, stride);
  _tile_loadd(6, b0, 64);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (N > 1) {
    _tile_loadd(7, b1, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (M > 1) {
    _tile_loadd(5, a1, stride);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
  }
}

// Sum (m, n) lies at `at` + m * down + n * right, in floats.
template <int M, int N>
BAM_TILES_INLINE void load_sums(const float* at, int64_t down, int64_t right, int64_t stride) {
  _tile_loadd(0, at, stride);
  if constexpr (N > 1) _tile_loadd(1, at + right, stride);
  if constexpr (M > 1) _tile_loadd(2, at + down, stride);
  if constexpr (M > 1 && N > 1) _tile_loadd(3, at + down + right, stride);
}
template <int M, int N>
BAM_TILES_INLINE void store_sums(float* at, int64_t down, int64_t right, int64_t stride) {
  _tile_stored(0, at, stride);
  if constexpr (N > 1) _tile_stored(1, at + right, stride);
  if constexpr (M > 1) _tile_stored(2, at + down, stride);
  if constexpr (M > 1 && N > 1) _tile_stored(3, at + down + right, stride);
}

// Whoever works on tiles: the configuration, for as long as it lives.
class Tiles {
 public:
  BAM_TILES Tiles() {
    asm volatile("" ::: "memory");
    _tile_loadconfig(&kConfig);
  }
  BAM_TILES ~Tiles() { _tile_release(); }
};

// Calls f<M, N> for one or two of each.
#define BAM_BY_TILES(f, two_m, two_n, ...)   \
  do {                                       \
    if ((two_m) && (two_n)) f<2, 2>(__VA_ARGS__); \
    else if (two_m) f<2, 1>(__VA_ARGS__);    \
    else if (two_n) f<1, 2>(__VA_ARGS__);    \
    else f<1, 1>(__VA_ARGS__);               \
  } while (0)

// --- pieces of vectors ------------------------------------------------------------------------------

BAM_INLINE __mmask32 first(int64_t n) {
  return n >= 32 ? ~__mmask32(0) : n <= 0 ? 0 : (__mmask32(1) << n) - 1;
}
BAM_INLINE __m512i load_some(const bf16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(first(n), p);
}

// To both halves of 32 values; the order of the lanes does not matter to sums.
BAM_INLINE void add_pairs(__m512i v, __m512& even, __m512& odd) {
  even += (__m512)_mm512_slli_epi32(v, 16);
  odd += (__m512)_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000)));
}

// A vector of 16 hidden channels, of which `left` are real, with its norm and the ReLU.
BAM_INLINE Vec<float> finished(Vec<float> y, const AmxFinish& f, int64_t channel) {
  if (f.scale) y *= load(f.scale + channel);
  if (f.shift) y += load(f.shift + channel);
  if (f.relu) y = relu<float>(y);
  const int64_t left = f.hidden - channel;
  if (left >= kTile) return y;
  const __mmask16 real = left <= 0 ? 0 : __mmask16((1 << left) - 1);
  return (Vec<float>)_mm512_maskz_mov_ps(real, (__m512)y);
}

// Where position p lies in a map.
BAM_INLINE int64_t place(const AmxMap& map, int64_t p) {
  const int64_t y = p / map.width, x = p % map.width;
  return y * map.row() + (map.pad + x) * map.channels;
}

// --- packing ----------------------------------------------------------------------------------------

void pack_rows(
    const bf16* w, int64_t rows, int64_t k, int64_t channels, int64_t t0, int64_t t1, bf16* to) {
  for (int64_t t = t0; t < t1; ++t) {
    bf16* tile = to + t * channels * kTileDepth;
    for (int64_t r = 0; r < channels; ++r)
      _mm512_storeu_si512(
          tile + r * kTileDepth,
          r < rows ? load_some(w + r * k + t * kTileDepth, k - t * kTileDepth)
                   : _mm512_setzero_si512());
  }
}

void pack_columns(
    const bf16* w, int64_t rows, int64_t k, int64_t channels, int64_t t0, int64_t t1, bf16* to) {
  for (int64_t t = t0; t < t1; ++t)
    for (int64_t r = 0; r < channels; r += kTile) {
      bf16* tile = to + (t * channels + r) * kTileDepth;
      __m512 v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        v[i] = r + i < rows
            ? (__m512)load_some(w + (r + i) * k + t * kTileDepth, k - t * kTileDepth)
            : _mm512_setzero_ps();
      transpose_16(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(tile + i * kTileDepth, v[i]);
    }
}

void pack_conv(const bf16* w, int64_t h, int64_t channels, int64_t t0, int64_t t1, bf16* to) {
  // Of two channels' taps, 18 values side by side, pairs by tap.
  alignas(64) int16_t pairs[32] = {};
  for (int i = 0; i < 9; ++i) pairs[2 * i] = int16_t(i), pairs[2 * i + 1] = int16_t(9 + i);
  const __m512i order = _mm512_load_si512(pairs);
  const int64_t outs = channels / kTile, tap = channels / kTileDepth * outs * kTileSize;
  for (int64_t t = t0; t < t1; ++t)
    for (int64_t j = 0; j < channels / 2; ++j) {
      const int64_t left = (h - 2 * j) * 9;  // of a row of weights
      __m512 v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int64_t o = t * kTile + i;
        const int64_t n = o < h ? (left < 18 ? left : 18) : 0;
        v[i] = (__m512)_mm512_permutexvar_epi16(order, load_some(w + (o * h + 2 * j) * 9, n));
      }
      transpose_16(v);
      bf16* row = to + (j / kTile * outs + t) * kTileSize + j % kTile * kTileDepth;
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i) _mm512_storeu_ps(row + i * tap, v[i]);
    }
}

// --- pooling and reduction, NCHW --------------------------------------------------------------------

constexpr int64_t kBlockChannels = 128, kBlockPositions = 256;

int64_t reduce_scratch(int64_t channels) {
  const int64_t rows = kBlockChannels * kBlockPositions, columns = kTile * (channels + kTileDepth);
  return std::max(rows, columns);
}

// Channels [0, c) and positions [0, n) at x as tiles [n / 16][c / 32] of [16 pairs of channels][16
// positions][2], zeros behind; each channel's sum is added to its pool, where given.
void pack_panel(const bf16* x, int64_t line, int64_t c, int64_t n, bf16* panel, float* pool) {
  const int64_t depth = (c + kTileDepth - 1) / kTileDepth;
  const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  for (int64_t j = 0; j < depth * kTile; ++j) {
    const bf16 *a = x + 2 * j * line, *b = a + line;
    const bool has_a = 2 * j < c, has_b = 2 * j + 1 < c;
    __m512 sums[4] = {};
    bf16* row = panel + j / kTile * kTileSize + j % kTile * kTileDepth;
    for (int64_t p = 0; p < n; p += 2 * kTile) {
      const int64_t left = n - p;
      const __m512i va = load_some(a + p, has_a ? left : 0), vb = load_some(b + p, has_b ? left : 0);
      add_pairs(va, sums[0], sums[1]);
      add_pairs(vb, sums[2], sums[3]);
      // Pairs by position: 0 to 3, 8 to 11 and so on in one, the others in the other.
      const __m512i even = _mm512_unpacklo_epi16(va, vb), odd = _mm512_unpackhi_epi16(va, vb);
      bf16* at = row + p / kTile * depth * kTileSize;
      _mm512_storeu_si512(at, _mm512_permutex2var_epi64(even, low, odd));
      if (left > kTile)
        _mm512_storeu_si512(at + depth * kTileSize, _mm512_permutex2var_epi64(even, high, odd));
    }
    if (pool && has_a) pool[2 * j] += _mm512_reduce_add_ps(sums[0] + sums[1]);
    if (pool && has_b) pool[2 * j + 1] += _mm512_reduce_add_ps(sums[2] + sums[3]);
  }
}

// Sums of M tiles of hidden channels by N of positions.
template <int M, int N>
BAM_TILES void reduce_tiles(
    const bf16* weight, int64_t weight_step, const bf16* panel, int64_t panel_step, int64_t depth,
    float* sums, int64_t right, bool accumulate) {
  if (accumulate) load_sums<M, N>(sums, kTileSums, right, 64);
  else clear<M, N>();
  for (int64_t t = 0; t < depth; ++t) {
    const bf16 *a = weight + t * weight_step, *b = panel + t * kTileSize;
    multiply<M, N>(a, a + kTileSize, 64, b, b + panel_step);
  }
  store_sums<M, N>(sums, kTileSums, right, 64);
}

void reduce_rows(
    const AmxReduce& r, const AmxMap& map, int64_t p0, int64_t p1, float* sums, float* pool,
    bf16* scratch) {
  const Tiles tiles;
  const int64_t outs = map.channels / kTile;
  for (int64_t p = p0; p < p1; p += kBlockPositions) {
    const int64_t n = std::min(p1 - p, kBlockPositions), columns = (n + kTile - 1) / kTile;
    for (int64_t c = 0; c < r.channels; c += kBlockChannels) {
      const int64_t some = std::min(r.channels - c, kBlockChannels);
      const int64_t depth = (some + kTileDepth - 1) / kTileDepth;
      pack_panel(r.x + c * r.line + p, r.line, some, n, scratch, pool ? pool + c : nullptr);
      const bf16* weight = r.weight + c * map.channels;
      for (int64_t q = 0; q < columns; q += 2)
        for (int64_t o = 0; o < outs; o += 2)
          BAM_BY_TILES(
              reduce_tiles, o + 1 < outs, q + 1 < columns, weight + o * kTileSize, outs * kTileSize,
              scratch + q * depth * kTileSize, depth * kTileSize, depth,
              sums + ((p / kTile + q) * outs + o) * kTileSums, outs * kTileSums, c > 0);
    }
  }
}

void finish(
    const float* sums, int64_t parts, int64_t size, const AmxMap& map, const AmxFinish& f,
    int64_t t0, int64_t t1, bf16* out) {
  const int64_t outs = map.channels / kTile, positions = map.height * map.width;
  for (int64_t t = t0; t < t1; ++t) {
    const int64_t n = std::min(kTile, positions - t * kTile);
    int64_t places[kTile];
    for (int64_t i = 0; i < n; ++i) places[i] = place(map, t * kTile + i);
    for (int64_t o = 0; o < outs; ++o) {
      const float* tile = sums + (t * outs + o) * kTileSums;
      __m512 v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_ps(tile + i * kTile);
      for (int64_t part = 1; part < parts; ++part)
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) v[i] += _mm512_loadu_ps(tile + part * size + i * kTile);
      transpose_16(v);
      for (int64_t i = 0; i < n; ++i)
        store(out + places[i] + o * kTile, finished((Vec<float>)v[i], f, o * kTile));
    }
  }
}

// --- pooling and reduction, channels_last -----------------------------------------------------------

// M tiles of positions by N of hidden channels, over all channels: [M][N][16][16] at `sums`.
template <int M, int N>
BAM_TILES void column_tiles(
    const bf16* x0, const bf16* x1, int64_t stride, const bf16* weight, int64_t step,
    int64_t depth, float* sums) {
  clear<M, N>();
  for (int64_t t = 0; t < depth; ++t) {
    const bf16* b = weight + t * step;
    multiply<M, N>(x0 + t * kTileDepth, x1 + t * kTileDepth, stride, b, b + kTileSize);
  }
  store_sums<M, N>(sums, N * kTileSums, kTileSums, 64);
}

// pool [C] += the sum over n positions.
void pool_columns(const bf16* x, int64_t line, int64_t channels, int64_t n, float* pool) {
  for (int64_t c = 0; c < channels; c += kTileDepth) {
    __m512 even = {}, odd = {};
    const int64_t left = channels - c;
    for (int64_t p = 0; p < n; ++p) add_pairs(load_some(x + p * line + c, left), even, odd);
    // Back in the channels' order.
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high =
        _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    const __m512 halves[2] = {
        _mm512_permutex2var_ps(even, low, odd), _mm512_permutex2var_ps(even, high, odd)};
    for (int i = 0; i < 2 && left > i * 16; ++i) {
      const int some = int(std::min<int64_t>(16, left - i * 16));
      float* to = pool + c + i * 16;
      store_n(to, load_n(to, some) + (Vec<float>)halves[i], some);
    }
  }
}

void reduce_columns(
    const AmxReduce& r, const AmxMap& map, const AmxFinish& f, int64_t p0, int64_t p1, bf16* out,
    float* pool, bf16* scratch) {
  const Tiles tiles;
  const int64_t outs = map.channels / kTile, depth = (r.channels + kTileDepth - 1) / kTileDepth;
  const bool whole = r.channels % kTileDepth == 0;
  alignas(64) float sums[4 * kTileSums];
  const int64_t step = whole ? 2 * kTile : kTile;
  for (int64_t p = p0; p < p1; p += step) {
    const int64_t n = std::min(p1 - p, step);
    const bf16* x = r.x + p * r.line;
    if (pool) pool_columns(x, r.line, r.channels, n, pool);
    // Incomplete tiles are of a copy with zeros behind: the second of two, or the only one.
    const bool two = n > kTile;
    const bool copied = !whole || n % kTile != 0;
    const bf16 *x0 = x, *x1 = x + kTile * r.line;
    int64_t stride0 = r.line * 2;
    if (copied) {
      const int64_t from = two ? kTile : 0, row = depth * kTileDepth;
      for (int64_t i = 0; i < kTile; ++i)
        for (int64_t c = 0; c < row; c += kTileDepth)
          _mm512_storeu_si512(
              scratch + i * row + c,
              load_some(x + (from + i) * r.line + c, from + i < n ? r.channels - c : 0));
      if (two) x1 = scratch;
      else x0 = scratch, stride0 = row * 2;
    }
    for (int64_t o = 0; o < outs; o += 2) {
      const bf16* weight = r.weight + o * kTileSize;
      const int64_t along = outs * kTileSize;
      const int64_t columns = o + 1 < outs ? 2 : 1;
      float* second = sums + columns * kTileSums;
      if (two && !copied) {
        BAM_BY_TILES(column_tiles, true, columns == 2, x0, x1, stride0, weight, along, depth, sums);
      } else {
        BAM_BY_TILES(column_tiles, false, columns == 2, x0, x0, stride0, weight, along, depth, sums);
        if (two)
          BAM_BY_TILES(
              column_tiles, false, columns == 2, x1, x1, depth * kTileDepth * 2, weight, along,
              depth, second);
      }
      for (int64_t i = 0; i < n; ++i) {
        const float* row = (i < kTile ? sums : second) + i % kTile * kTile;
        bf16* to = out + place(map, p + i) + o * kTile;
        for (int64_t k = 0; k < columns; ++k)
          store(to + k * kTile, finished(load(row + k * kTileSums), f, (o + k) * kTile));
      }
    }
  }
}

// --- convolution ------------------------------------------------------------------------------------

struct Taps {
  const bf16* in[2][9];  // of one or two rows
  const bf16* weight[9];
  int count = 0;
};

// 16 positions of M rows by N tiles of outputs: [M][N][16][16] at `sums`.
template <int M, int N>
BAM_TILES void conv_tiles(
    const Taps& taps, int64_t at, int64_t channels, int64_t output, float* sums) {
  const int64_t step = channels / kTile * kTileSize;  // along the depth
  clear<M, N>();
  for (int i = 0; i < taps.count; ++i) {
    const bf16 *a0 = taps.in[0][i] + at, *a1 = M > 1 ? taps.in[1][i] + at : a0;
    const bf16* b = taps.weight[i] + output * kTileSize;
    for (int64_t k = 0; k < channels; k += kTileDepth, b += step)
      multiply<M, N>(a0 + k, a1 + k, channels * 2, b, b + kTileSize);
  }
  store_sums<M, N>(sums, N * kTileSums, kTileSums, 64);
}

void conv(const AmxConv& c, const AmxMap& map, const AmxFinish& f, int64_t y0, int64_t y1) {
  const Tiles tiles;
  const int64_t channels = map.channels, outs = channels / kTile;
  const int64_t tap_size = channels / kTileDepth * outs * kTileSize;
  alignas(64) float sums[4 * kTileSums];
  for (int64_t y = y0; y < y1; y += 2) {
    const int rows = y + 1 < y1 ? 2 : 1;
    Taps taps;
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t down = (tap / 3 - 1) * c.dilation, shift = (tap % 3 - 1) * c.dilation;
      if (shift >= map.width || -shift >= map.width) continue;  // all of it on the padding
      auto inside = [&](int64_t row) { return row + down >= 0 && row + down < map.height; };
      const bool some = inside(y), other = rows == 2 && inside(y + 1);
      if (!some && !other) continue;
      for (int i = 0; i < rows; ++i)
        taps.in[i][taps.count] = c.in + (map.pad + shift) * channels +
            ((i == 0 ? some : other) ? y + i + down : map.height) * map.row();
      taps.weight[taps.count++] = c.weight + tap * tap_size;
    }
    for (int64_t x = 0; x < map.width; x += kTile) {
      const int64_t n = std::min(kTile, map.width - x);
      for (int64_t o = 0; o < outs; o += 2) {
        const int64_t columns = o + 1 < outs ? 2 : 1;
        BAM_BY_TILES(conv_tiles, rows == 2, columns == 2, taps, x * channels, channels, o, sums);
        for (int m = 0; m < rows; ++m)
          for (int64_t i = 0; i < n; ++i) {
            const float* row = sums + m * columns * kTileSums + i * kTile;
            const int64_t at = (y + m) * map.row() + (map.pad + x + i) * channels + o * kTile;
            Vec<float> logit = zero<float>();
            for (int64_t k = 0; k < columns; ++k) {
              const Vec<float> v = finished(load(row + k * kTileSums), f, (o + k) * kTile);
              if (c.out) store(c.out + at + k * kTile, v);
              if (c.project) logit += v * load(c.project + (o + k) * kTile);
            }
            if (!c.project) continue;
            float* to = c.logits + (y + m) * map.width + x + i;
            *to = (o > 0 ? *to : 0.0f) + sum<float>(logit);
          }
      }
    }
  }
}

bool permitted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned bf16_products = 1u << 22, tile = 1u << 24;
  if (!(d & bf16_products) || !(d & tile) || !__builtin_cpu_supports("avx512bw")) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

} // namespace
} // namespace BAM_ISA

const Amx* amx_units() {
  static const Amx table = {
      amx::pack_rows,
      amx::pack_columns,
      amx::pack_conv,
      amx::reduce_scratch,
      amx::reduce_rows,
      amx::finish,
      amx::reduce_columns,
      amx::conv,
  };
  static const bool has = amx::permitted();
  return has ? &table : nullptr;
}

} // namespace bam
#else
namespace bam {
const Amx* amx_units() { return nullptr; }
} // namespace bam
#endif
