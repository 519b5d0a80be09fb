#include "launch.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace bam {

// --- scratch ----------------------------------------------------------------------------------

namespace {

struct Block {
  std::unique_ptr<char, decltype(&std::free)> data;
  size_t size;
};

// Above this a thread gives its memory back when its last arena ends.
constexpr size_t kKept = size_t(32) << 20;

struct Stack {
  std::vector<Block> blocks;
  size_t block = 0, used = 0;
};

Stack& stack() {
  static thread_local Stack s;
  return s;
}

// Under AddressSanitizer what no arena has given is out of bounds, and a gap behind each piece.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGap = 64;
void forbid(const Block& b, size_t from) {
  __asan_poison_memory_region(b.data.get() + from, b.size - from);
}
void allow(void* p, size_t n) { __asan_unpoison_memory_region(p, n); }
#else
constexpr size_t kGap = 0;
void forbid(const Block&, size_t) {}
void allow(void*, size_t) {}
#endif

void add_block(Stack& s, size_t size) {
  void* p = std::aligned_alloc(64, size);
  if (!p) return;
  s.blocks.push_back({{static_cast<char*>(p), &std::free}, size});
  forbid(s.blocks.back(), 0);
}

} // namespace

Arena::Arena() : block_(stack().block), used_(stack().used) {}

Arena::~Arena() {
  Stack& s = stack();
  s.block = block_, s.used = used_;
  for (size_t i = block_; i < s.blocks.size(); ++i) forbid(s.blocks[i], i == block_ ? used_ : 0);
  if (block_ == 0 && used_ == 0 && !s.blocks.empty()) {
    size_t total = 0;
    for (const Block& b : s.blocks) total += b.size;
    if (total > kKept) {
      s.blocks.clear();
    } else if (s.blocks.size() > 1) {  // the next call finds room in one block
      s.blocks.clear();
      add_block(s, total);
    }
  }
}

void* Arena::bytes(size_t n) {
  Stack& s = stack();
  const size_t given = n;
  n = (n + 63) / 64 * 64 + kGap;
  while (s.block < s.blocks.size() && s.used + n > s.blocks[s.block].size) ++s.block, s.used = 0;
  if (s.block == s.blocks.size()) {
    size_t size = n < (size_t(1) << 16) ? size_t(1) << 16 : n;
    add_block(s, size);
    STD_TORCH_CHECK(
        s.block < s.blocks.size(), "bam_kernels: cannot allocate ", size, " bytes of scratch memory");
    s.used = 0;
  }
  void* p = s.blocks[s.block].data.get() + s.used;
  s.used += n;
  allow(p, given);
  return p;
}

// --- tensors ----------------------------------------------------------------------------------

namespace {

// As `bam_kernels.layout.strides`: false where x cannot be walked in that order.
bool walk(const Tensor& x, bool channels_last, View& v) {
  const auto size = x.sizes();
  const auto st = x.strides();
  v.n = size[0], v.c = size[1], v.h = size[2], v.w = size[3], v.p = v.h * v.w;
  v.channels_last = channels_last;
  if (v.h > 1 && v.w > 1 && st[2] != v.w * st[3]) return false;
  const int64_t sp = v.w > 1 ? st[3] : st[2];
  const int64_t inner_length = channels_last ? v.c : v.p, inner = channels_last ? st[1] : sp;
  const int64_t outer_length = channels_last ? v.p : v.c, outer = channels_last ? sp : st[1];
  if (inner_length > 1 && inner != 1) return false;
  v.line = outer_length > 1 ? outer : inner_length;
  v.sample = v.n > 1 ? st[0] : v.line * outer_length;
  return true;
}

} // namespace

View view_of(const Tensor& x, const char* name) {
  check_tensor(x, name);
  STD_TORCH_CHECK(
      x.dim() == 4, name, ": expected [N, C, H, W], got ",
      shape_text(x.sizes().data(), int64_t(x.sizes().size())));
  View v, last;
  const bool rows = walk(x, false, v), columns = walk(x, true, last);
  STD_TORCH_CHECK(
      rows || columns, name, ": expected positions or channels to be dense, got other strides");
  // A 1x1 map is both; dense channels then give the longer lines.
  if (!rows || (columns && v.p == 1 && v.c > 1)) return last;
  return v;
}

View view_like(const Tensor& t, const char* name, const View& like) {
  check_tensor(t, name);
  View v;
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected [N, C, H, W]");
  STD_TORCH_CHECK(
      walk(t, like.channels_last, v), name, ": expected the memory format of x, got other strides");
  return v;
}

// What `values` asks of a tensor; returns how many there are.
static int64_t check_values(
    const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  check_tensor(t, name);
  const auto found = t.sizes();
  const size_t axes = shape.size();
  // A matrix [o, i] may come as the weight of a 1x1 convolution, [o, i, 1, 1].
  bool same = found.size() == axes ||
      (axes == 2 && found.size() == 4 && found[2] == 1 && found[3] == 1);
  int64_t n = 1;
  size_t axis = 0;
  for (int64_t size : shape) {
    same = same && found[axis++] == size;
    n *= size;
  }
  STD_TORCH_CHECK(
      same, name, ": expected shape ", shape_text(shape.begin(), int64_t(axes)), ", got ",
      shape_text(found.data(), int64_t(found.size())));
  return n;
}

template <class A>
const A* values(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, Arena& arena) {
  if (absent(t)) return nullptr;
  const int64_t n = check_values(t, name, shape);
  const auto found = t.sizes();
  if (t.scalar_type() == TypeOf<A>::value && t.is_contiguous()) return data<A>(t);
  A* out = arena.take<A>(n);
  with_type(t.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    const S* from = data<S>(t);
    auto convert = [&](const S* p, A* to, int64_t count) {
      if constexpr (std::is_same_v<S, A>) {
        std::memcpy(to, p, size_t(count) * sizeof(A));
      } else {
        AccOf<S>* wide = std::is_same_v<AccOf<S>, A> ? reinterpret_cast<AccOf<S>*>(to)
                                                     : arena.take<AccOf<S>>(count);
        if constexpr (std::is_same_v<S, AccOf<S>>) {
          for (int64_t i = 0; i < count; ++i) to[i] = A(p[i]);
        } else {
          kernels<S>().widen(p, wide, count);
          if (static_cast<void*>(wide) != static_cast<void*>(to))
            for (int64_t i = 0; i < count; ++i) to[i] = A(wide[i]);
        }
      }
    };
    if (t.is_contiguous()) {
      constexpr int64_t kBlock = 16384;
      if (std::is_same_v<AccOf<S>, A> && n >= 2 * kBlock) {  // a half type's, without scratch
        parallel(true, (n + kBlock - 1) / kBlock, [&](int64_t begin, int64_t end) {
          convert(from + begin * kBlock, out + begin * kBlock,
                  std::min(end * kBlock, n) - begin * kBlock);
        });
      } else {
        convert(from, out, n);
      }
      return;
    }
    // Gathered in the storage type first.
    S* dense = arena.take<S>(n);
    const auto strides = t.strides();
    const int64_t dim = int64_t(found.size());
    int64_t size[4] = {1, 1, 1, 1}, stride[4] = {0, 0, 0, 0};
    for (int64_t i = 0; i < dim; ++i) size[4 - dim + i] = found[i], stride[4 - dim + i] = strides[i];
    S* to = dense;
    for (int64_t a = 0; a < size[0]; ++a)
      for (int64_t b = 0; b < size[1]; ++b)
        for (int64_t c = 0; c < size[2]; ++c)
          for (int64_t d = 0; d < size[3]; ++d)
            *to++ = from[a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3]];
    convert(dense, out, n);
  });
  return out;
}
template const float* values<float>(
    const Tensor&, const char*, std::initializer_list<int64_t>, Arena&);
template const double* values<double>(
    const Tensor&, const char*, std::initializer_list<int64_t>, Arena&);

const bf16* bf16_values(
    const Tensor& t, const char* name, std::initializer_list<int64_t> shape, Arena& arena) {
  if (absent(t)) return nullptr;
  const int64_t n = check_values(t, name, shape);
  if (t.scalar_type() == ScalarType::BFloat16 && t.is_contiguous()) return data<bf16>(t);
  bf16* out = arena.take<bf16>(n);
  kernels<bf16>().narrow(values<float>(t, name, shape, arena), out, n);
  return out;
}

template <class A>
void write_values(const A* from, const Tensor& to, int64_t n) {
  with_type(to.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    S* out = mutable_data<S>(to);
    if constexpr (std::is_same_v<S, A>) {
      if (static_cast<const void*>(out) != static_cast<const void*>(from))
        std::memcpy(out, from, size_t(n) * sizeof(A));
    } else if constexpr (std::is_same_v<AccOf<S>, A>) {
      kernels<S>().narrow(from, out, n);
    } else if constexpr (sizeof(S) == 2) {
      Arena arena;
      float* narrow = arena.take<float>(n);
      for (int64_t i = 0; i < n; ++i) narrow[i] = float(from[i]);
      kernels<S>().narrow(narrow, out, n);
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = S(from[i]);
    }
  });
}
template void write_values<float>(const float*, const Tensor&, int64_t);
template void write_values<double>(const double*, const Tensor&, int64_t);

// --- weights and maps as the kernels take them ----------------------------------------------------

template <class A>
const A* padded(const A* v, int64_t n, int64_t ld, Arena& arena) {
  if (!v || n == ld) return v;
  A* out = arena.zeros<A>(ld);
  std::memcpy(out, v, size_t(n) * sizeof(A));
  return out;
}
template const float* padded<float>(const float*, int64_t, int64_t, Arena&);
template const double* padded<double>(const double*, int64_t, int64_t, Arena&);

template <class A>
const A* Packer<A>::matrix(const A* w, int64_t rows, int64_t k, int64_t ld) {
  A* out = arena_.take<A>(k * ld);
  jobs_.push_back({Kind::matrix, w, out, rows, k, ld, k, 64});
  return out;
}

template <class A>
const A* Packer<A>::conv(const A* w, int64_t h, int64_t ld, bool gradient, bool by_output) {
  A* out = arena_.take<A>(9 * h * ld);
  const Kind kind =
      gradient ? Kind::gradient : by_output ? Kind::conv_by_output : Kind::conv;
  // The taps of 16 channels are whole vectors.
  if (kind == Kind::conv_by_output)
    jobs_.push_back({kind, w, out, h, 9 * h, ld, ld, wide_kernels<A>().lanes});
  else
    jobs_.push_back({kind, w, out, h, 9 * h, ld, h, 16});
  return out;
}

template <class A>
void Packer<A>::run(bool threads) {
  const WideKernels<A>& k = wide_kernels<A>();
  auto piece = [&](const Job& j, int64_t begin, int64_t end) {
    const int64_t tap = j.rows * j.ld;
    if (j.kind == Kind::matrix) {
      k.transpose(j.from + begin, j.k, j.rows, end - begin, j.to + begin * j.ld, j.ld, j.ld);
    } else if (j.kind == Kind::conv_by_output) {
      k.transpose_taps(
          j.from + begin * j.k, j.k, std::min(end, j.rows) - begin, j.k, j.to + begin, 9, tap, j.ld,
          end - begin);
    } else if (j.kind == Kind::conv) {
      k.transpose_taps(
          j.from + begin * 9, j.k, j.rows, (end - begin) * 9, j.to + begin * j.ld, 9, tap, j.ld,
          j.ld);
    } else {
      for (int64_t o = begin; o < end; ++o)  // the last tap first
        k.transpose(j.from + o * j.k, 9, j.rows, 9, j.to + 8 * tap + o * j.ld, -tap, j.ld);
    }
  };
  // A thread takes its part of each: that of the reduction is what it will use itself.
  const int64_t parts = threads ? int64_t(torch::stable::get_num_threads()) : 1;
  parallel(threads, parts, [&](int64_t first, int64_t last) {
    for (const Job& j : jobs_) {
      const int64_t blocks = (j.count + j.block - 1) / j.block;
      for (int64_t i = part(first, parts, blocks); i < part(last, parts, blocks); ++i)
        piece(j, i * j.block, std::min((i + 1) * j.block, j.count));
    }
  });
  jobs_.clear();
}
template class Packer<float>;
template class Packer<double>;

const bf16* TilePacker::matrix(const bf16* w, int64_t rows, int64_t k, bool right) {
  const int64_t tiles = (k + kTileDepth - 1) / kTileDepth;
  bf16* out = arena_.take<bf16>(tiles * channels_ * kTileDepth);
  jobs_.push_back({right ? Kind::right : Kind::left, w, out, rows, k, tiles});
  return out;
}

const bf16* TilePacker::conv(const bf16* w, int64_t h) {
  bf16* out = arena_.take<bf16>(9 * channels_ * channels_);
  jobs_.push_back({Kind::conv, w, out, h, h, channels_ / kTile});
  return out;
}

void TilePacker::run(bool threads) {
  const int64_t parts = threads ? int64_t(torch::stable::get_num_threads()) : 1;
  parallel(threads, parts, [&](int64_t begin, int64_t end) {
    for (const Job& j : jobs_) {
      const int64_t t0 = part(begin, parts, j.tiles), t1 = part(end, parts, j.tiles);
      if (j.kind == Kind::conv) units_->pack_conv(j.from, j.rows, channels_, t0, t1, j.to);
      else
        (j.kind == Kind::left ? units_->pack_rows : units_->pack_columns)(
            j.from, j.rows, j.k, channels_, t0, t1, j.to);
    }
  });
  jobs_.clear();
}

template <class A>
void load_hidden(const Tensor& t, const View& v, int64_t n, A* out, int64_t ld, Arena& arena) {
  with_type(t.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    if constexpr (std::is_same_v<AccOf<S>, A>) {
      const S* from = data<S>(t) + n * v.sample;
      if (v.channels_last) {
        std::memset(out, 0, size_t(v.p * ld) * sizeof(A));
        for (int64_t p = 0; p < v.p; ++p)
          if constexpr (std::is_same_v<S, A>)
            std::memcpy(out + p * ld, from + p * v.line, size_t(v.c) * sizeof(A));
          else
            kernels<S>().widen(from + p * v.line, out + p * ld, v.c);
        return;
      }
      const A* rows;
      int64_t line = v.line;
      if constexpr (std::is_same_v<S, A>) {
        rows = from;
      } else {
        A* wide = arena.take<A>(v.c * v.p);
        for (int64_t j = 0; j < v.c; ++j) kernels<S>().widen(from + j * line, wide + j * v.p, v.p);
        rows = wide, line = v.p;
      }
      wide_kernels<A>().transpose(rows, line, v.c, v.p, out, ld, ld);
    } else {
      STD_TORCH_CHECK(false, "expected a map of the accumulator's type or a half type");
    }
  });
}
template void load_hidden<float>(const Tensor&, const View&, int64_t, float*, int64_t, Arena&);
template void load_hidden<double>(const Tensor&, const View&, int64_t, double*, int64_t, Arena&);

template <class A>
void store_hidden(
    const A* from, int64_t ld, const Tensor& t, const View& v, int64_t n, int64_t p0, int64_t p1,
    Arena& arena) {
  with_type(t.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    if constexpr (std::is_same_v<AccOf<S>, A>) {
      S* to = mutable_data<S>(t) + n * v.sample;
      if (v.channels_last) {
        for (int64_t p = p0; p < p1; ++p)
          kernels<S>().narrow(from + p * ld, to + p * v.line, v.c);
        return;
      }
      const int64_t length = p1 - p0;
      if constexpr (std::is_same_v<S, A>) {
        wide_kernels<A>().transpose(from + p0 * ld, ld, length, v.c, to + p0, v.line, length);
      } else {
        A* wide = arena.take<A>(v.c * length);
        wide_kernels<A>().transpose(from + p0 * ld, ld, length, v.c, wide, length, length);
        for (int64_t j = 0; j < v.c; ++j)
          kernels<S>().narrow(wide + j * length, to + j * v.line + p0, length);
      }
    } else {
      STD_TORCH_CHECK(false, "expected a map of the accumulator's type or a half type");
    }
  });
}
template void store_hidden<float>(
    const float*, int64_t, const Tensor&, const View&, int64_t, int64_t, int64_t, Arena&);
template void store_hidden<double>(
    const double*, int64_t, const Tensor&, const View&, int64_t, int64_t, int64_t, Arena&);

// --- the gate's vectors -------------------------------------------------------------------------

template <class A>
bool can_factor(const A* c, int64_t channels, const A* s, int64_t positions) {
  const A limit = std::is_same_v<A, float> ? A(80) : A(700);
  A largest_c = 0, largest_s = 0;
  bool numbers = true;
  for (int64_t i = 0; i < channels; ++i) {
    const A size = std::abs(c[i]);
    numbers &= size == size;
    largest_c = size > largest_c ? size : largest_c;
  }
  for (int64_t i = 0; i < positions; ++i) {
    const A size = std::abs(s[i]);
    numbers &= size == size;
    largest_s = size > largest_s ? size : largest_s;
  }
  return numbers && largest_c + largest_s < limit;
}
template bool can_factor<float>(const float*, int64_t, const float*, int64_t);
template bool can_factor<double>(const double*, int64_t, const double*, int64_t);

template <class A>
Gate<A> prepare_gate(
    Combine combine, bool residual, bool channels_last, const A* c, int64_t channels, const A* s,
    int64_t positions, A* c_room, A* s_room) {
  const WideKernels<A>& k = wide_kernels<A>();
  Gate<A> g{Map::sum, residual, channels_last, c_room, s_room};
  if (!c || !s) {
    g.map = c ? Map::channel : Map::spatial;
    if (c) k.sigmoid(c, c_room, channels);
    else k.sigmoid(s, s_room, positions);
    return g;
  }
  if (combine == Combine::sum && can_factor(c, channels, s, positions)) {
    g.map = Map::factored;
    k.exp_negative(c, c_room, channels);
    k.exp_negative(s, s_room, positions);
  } else if (combine == Combine::sum || combine == Combine::product) {
    g.map = combine == Combine::sum ? Map::sum : Map::product;
    g.by_channel = c, g.by_position = s;
  } else {
    g.map = combine == Combine::maximum ? Map::maximum : Map::sigmoid_sum;
    k.sigmoid(c, c_room, channels);
    k.sigmoid(s, s_room, positions);
  }
  return g;
}
template Gate<float> prepare_gate<float>(
    Combine, bool, bool, const float*, int64_t, const float*, int64_t, float*, float*);
template Gate<double> prepare_gate<double>(
    Combine, bool, bool, const double*, int64_t, const double*, int64_t, double*, double*);

} // namespace bam
