// The dilated 3x3 convolutions (Eq. 4) on hidden maps, and the gradients of their weights. Taps on
// the padding are left out: a row is cut where the taps that lie inside change.
#pragma once

#include "maps.h"

namespace bam {
namespace BAM_ISA {

// Calls f(x0, x1) for the runs of columns that have the same taps: at most three.
template <class F>
BAM_INLINE void for_runs(int64_t width, int64_t dilation, F&& f) {
  const int64_t a = dilation < width ? dilation : width;  // from here on there is a left tap
  const int64_t b = width - a;                            // up to here there is a right one
  const int64_t cut[4] = {0, a < b ? a : b, a < b ? b : a, width};
  for (int i = 0; i < 3; ++i)
    if (cut[i] < cut[i + 1]) f(cut[i], cut[i + 1]);
}

// Rows [row0, row1), of the output channels' vectors [vec0, vec1).
template <class A>
void conv(const Conv<A>& c, int64_t row0, int64_t row1, int64_t vec0, int64_t vec1) {
  constexpr int W = kLanes<A>;
  const int64_t width = c.width, ld = c.ld, j = vec0 * W, channels = (vec1 - vec0) * W;
  for (int64_t y = row0; y < row1; ++y) {
    A* line = c.out + y * width * ld + j;
    for_runs(width, c.dilation, [&](int64_t x0, int64_t x1) {
      Term<A> terms[9];
      int64_t count = 0;
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t row = y + (tap / 3 - 1) * c.dilation, shift = (tap % 3 - 1) * c.dilation;
        if (row < 0 || row >= c.height || x0 + shift < 0 || x1 + shift > width) continue;
        terms[count++] = {
            c.in + (row * width + x0 + shift) * ld, c.weight + tap * c.hidden * ld + j};
      }
      product<A>(
          {x1 - x0, vec1 - vec0, terms, count, c.hidden, ld, 1, ld, line + x0 * ld, ld, false});
    });
    if (c.scale || c.shift || c.relu)
      affine(
          line, line, width, channels, ld, c.scale ? c.scale + j : nullptr,
          c.shift ? c.shift + j : nullptr, c.relu);
    if (c.act) relu_gradient(line, c.act + y * width * ld + j, width, channels, ld);
    if (c.project) {
      const int64_t left = c.hidden - j < channels ? c.hidden - j : channels;
      project(line, width, ld, left, c.project + j, c.logits + y * width);
    }
  }
}

// dw [9][hidden][ld] += sum over positions of in, shifted by tap, times dz; of inputs [i0, i1).
template <class A>
void conv_weight_gradient(const Conv<A>& c, const A* dz, int64_t i0, int64_t i1, A* dw) {
  const int64_t width = c.width, ld = c.ld;
  constexpr int64_t kTerms = 16;
  const int64_t fit = 4096 / (width * ld);  // so many rows of dz are 16 KiB of floats
  const int64_t rows = fit < 1 ? 1 : fit < kTerms ? fit : kTerms;
  for (int64_t block = 0; block < c.height; block += rows)
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t down = (tap / 3 - 1) * c.dilation, shift = (tap % 3 - 1) * c.dilation;
      const int64_t x0 = shift < 0 ? -shift : 0, x1 = shift > 0 ? width - shift : width;
      if (x0 >= x1) continue;
      Term<A> terms[kTerms];
      int64_t count = 0;
      for (int64_t y = block; y < block + rows && y < c.height; ++y)
        if (y + down >= 0 && y + down < c.height)
          terms[count++] = {
              c.in + ((y + down) * width + x0 + shift) * ld + i0, dz + (y * width + x0) * ld};
      if (count)
        product<A>(
            {i1 - i0, ld / kLanes<A>, terms, count, x1 - x0, 1, ld, ld,
             dw + (tap * c.hidden + i0) * ld, ld, true});
    }
}

} // namespace BAM_ISA
} // namespace bam
