// The x-sized operators of training, forward and backward: 3 + 5 passes over x-sized memory. How
// the work is cut, and with it the order of every sum, depends on the shapes alone.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "launch.h"
#include "operators.h"

namespace bam {

namespace {

constexpr int64_t kSerial = 16384;  // elements of x below which threads are not worth waking

// Into how many parts each of n samples is cut, so that there are eight pieces of work or more.
int64_t parts_of(int64_t n) { return n >= 8 ? 1 : (8 + n - 1) / n; }

bool threaded(const View& v) {
  return torch::stable::get_num_threads() > 1 && v.n * v.c * v.p >= kSerial;
}

// Positions of part k: whole tiles.
struct Range {
  int64_t begin, end;
};
Range positions(int64_t k, int64_t parts, int64_t p, int64_t tile) {
  const int64_t tiles = (p + tile - 1) / tile;
  return {part(k, parts, tiles) * tile, std::min(part(k + 1, parts, tiles) * tile, p)};
}

template <class A>
struct Logits {
  const A* c;  // [N][C], or null
  const A* s;  // [N][P], or null
};

template <class A>
Logits<A> read_logits(const Tensor& c, const Tensor& s, const View& v, Arena& arena) {
  return {
      values<A>(c, "channel_logits", {v.n, v.c}, arena),
      values<A>(s, "spatial_logits", {v.n, 1, v.h, v.w}, arena)};
}

// The gate of every sample.
template <class A>
std::vector<Gate<A>> gates_of(
    Combine combine, bool residual, const View& v, const Logits<A>& l, bool threads, Arena& arena) {
  A* c_room = arena.take<A>(v.n * v.c);
  A* s_room = arena.take<A>(v.n * v.p);
  std::vector<Gate<A>> gates(size_t(v.n));
  parallel(threads, v.n, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      gates[size_t(n)] = prepare_gate<A>(
          combine, residual, v.channels_last, l.c ? l.c + n * v.c : nullptr, v.c,
          l.s ? l.s + n * v.p : nullptr, v.p, c_room + n * v.c, s_room + n * v.p);
  });
  return gates;
}

// w [h][C] as panels [C / kPanel][h][kPanel], zero behind C.
template <class A>
const A* panels(const A* w, int64_t h, int64_t channels, Arena& arena) {
  const int64_t count = (channels + kPanel - 1) / kPanel;
  A* out = arena.zeros<A>(count * h * kPanel);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < h; ++j)
      std::copy(
          w + j * channels + i * kPanel, w + j * channels + std::min((i + 1) * kPanel, channels),
          out + (i * h + j) * kPanel);
  return out;
}

} // namespace

void pool_reduce(Tensor x, Tensor weight, Tensor bias, Tensor pooled, Tensor reduced) {
  const View v = view_of(x, "x");
  STD_TORCH_CHECK(weight.dim() > 0, "weight: expected [h, C], got a scalar");
  const int64_t h = absent(weight) ? 0 : weight.size(0);
  const bool pool = pooled.numel() > 0;
  if (pool) {
    check_shape(pooled, "pooled", {v.n, v.c});
    check_tensor(pooled, "pooled"), check_contiguous(pooled, "pooled");
  }
  View to{};
  if (h) {
    check_shape(reduced, "reduced", {v.n, h, v.h, v.w});
    check_tensor(reduced, "reduced"), check_dtype(reduced, "reduced", x.scalar_type());
    to = view_like(reduced, "reduced", v);
  }
  if (x.numel() == 0) return;
  with_type(x.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using A = AccOf<S>;
    const Kernels<S>& k = kernels<S>();
    Arena arena;
    const A* w = h ? values<A>(weight, "weight", {h, v.c}, arena) : nullptr;
    const A* b = h ? values<A>(bias, "bias", {h}, arena) : nullptr;
    const bool threads = threaded(v);
    const int64_t parts = parts_of(v.n), ld = whole_vectors(h, k.lanes);
    Packer<A> packer(arena);
    if (h) w = packer.matrix(w, h, v.c, ld), b = padded(b, h, ld, arena);
    packer.run(threads);
    A* sums = pool ? arena.zeros<A>(v.n * parts * v.c) : nullptr;
    parallel(threads, v.n * parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Arena own;
        A* scratch = own.take<A>(k.reduce_scratch(v.c));
        A* map = own.take<A>(v.p * ld);
        const int64_t n = i / parts, p0 = part(i % parts, parts, v.p);
        const int64_t p1 = part(i % parts + 1, parts, v.p);
        const Reduce<S> all{
            data<S>(x) + n * v.sample, v.line, v.channels_last, v.c, h, w, ld, map, nullptr, b,
            false};
        k.reduce(all, p0, p1, sums ? sums + i * v.c : nullptr, scratch);
        if (h && p0 < p1) store_hidden<A>(map, ld, reduced, to, n, p0, p1, own);
      }
    });
    if (!pool) return;
    A* means = arena.take<A>(v.n * v.c);
    parallel(threads, v.n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * v.c; i < end * v.c; ++i) {
        A total = 0;
        for (int64_t p = 0; p < parts; ++p) total += sums[(i / v.c * parts + p) * v.c + i % v.c];
        means[i] = total / A(v.p);
      }
    });
    write_values<A>(means, pooled, v.n * v.c);
  });
}

void gate_forward(Tensor x, Tensor c, Tensor s, Tensor out, int64_t combine, bool residual) {
  const View v = view_of(x, "x");
  check_tensor(out, "out"), check_dtype(out, "out", x.scalar_type());
  check_shape(out, "out", {v.n, v.c, v.h, v.w});
  const View to = view_like(out, "out", v);
  STD_TORCH_CHECK(
      !absent(c) || !absent(s) || x.numel() == 0,
      "channel_logits, spatial_logits: expected at least one, got none");
  if (x.numel() == 0) return;
  with_type(x.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using A = AccOf<S>;
    const Kernels<S>& k = kernels<S>();
    Arena arena;
    const bool threads = threaded(v);
    const auto gates = gates_of<A>(
        combine_of(combine), residual, v, read_logits<A>(c, s, v, arena), threads, arena);
    const int64_t parts = parts_of(v.n), lines = v.channels_last ? v.p : v.c;
    parallel(threads, v.n * parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / parts, l0 = part(i % parts, parts, lines);
        const int64_t l1 = part(i % parts + 1, parts, lines);
        const S* from = data<S>(x) + n * v.sample;
        S* into = mutable_data<S>(out) + n * to.sample;
        const Gate<A>& g = gates[size_t(n)];
        if (v.channels_last) k.gate(g, from, v.line, into, to.line, 0, v.c, l0, l1);
        else k.gate(g, from, v.line, into, to.line, l0, l1, 0, v.p);
      }
    });
  });
}

void gate_gradient(
    Tensor dout, Tensor x, Tensor c, Tensor s, Tensor dc, Tensor ds, int64_t combine) {
  const View v = view_of(x, "x");
  check_dtype(dout, "dout", x.scalar_type());
  check_shape(dout, "dout", {v.n, v.c, v.h, v.w});
  const View from = view_like(dout, "dout", v);
  if (!absent(c)) {
    check_tensor(dc, "dc"), check_contiguous(dc, "dc"), check_shape(dc, "dc", {v.n, v.c});
  }
  if (!absent(s)) {
    check_tensor(ds, "ds"), check_contiguous(ds, "ds");
    check_shape(ds, "ds", {v.n, 1, v.h, v.w});
  }
  if (x.numel() == 0) return;
  with_type(x.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using A = AccOf<S>;
    const Kernels<S>& k = kernels<S>();
    const WideKernels<A>& wide = wide_kernels<A>();
    const Combine mode = combine_of(combine);
    Arena arena;
    const Logits<A> l = read_logits<A>(c, s, v, arena);
    const bool both = l.c && l.s, threads = threaded(v);
    const int64_t parts = parts_of(v.n);
    // The sums across the parts of a sample are partial, the others whole.
    const int64_t c_parts = v.channels_last ? parts : 1, s_parts = v.channels_last ? 1 : parts;
    A* c_sums = l.c ? arena.zeros<A>(v.n * c_parts * v.c) : nullptr;
    A* s_sums = l.s ? arena.zeros<A>(v.n * s_parts * v.p) : nullptr;
    A* c_room = l.c ? arena.take<A>(v.n * v.c) : nullptr;
    A* s_room = l.s ? arena.take<A>(v.n * v.p) : nullptr;
    std::vector<char> factored(size_t(v.n), 0);
    parallel(threads, v.n, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const A *cn = l.c ? l.c + n * v.c : nullptr, *sn = l.s ? l.s + n * v.p : nullptr;
        if (both && mode == Combine::sum && can_factor(cn, v.c, sn, v.p)) {
          factored[size_t(n)] = 1;
          wide.exp_negative(cn, c_room + n * v.c, v.c);
          wide.exp_negative(sn, s_room + n * v.p, v.p);
        } else if (both && mode == Combine::sigmoid_sum) {
          wide.sigmoid_slope(cn, c_room + n * v.c, v.c);
          wide.sigmoid_slope(sn, s_room + n * v.p, v.p);
        } else {
          if (cn) std::memcpy(c_room + n * v.c, cn, size_t(v.c) * sizeof(A));
          if (sn) std::memcpy(s_room + n * v.p, sn, size_t(v.p) * sizeof(A));
        }
      }
    });
    const int64_t lines = v.channels_last ? v.p : v.c;
    parallel(threads, v.n * parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / parts, p = i % parts;
        const int64_t l0 = part(p, parts, lines), l1 = part(p + 1, parts, lines);
        k.gate_gradient(
            mode, l.c != nullptr, l.s != nullptr, factored[size_t(n)] != 0, v.channels_last,
            data<S>(dout) + n * from.sample, from.line, data<S>(x) + n * v.sample, v.line,
            c_room ? c_room + n * v.c : nullptr, s_room ? s_room + n * v.p : nullptr,
            c_sums ? c_sums + (n * c_parts + (c_parts > 1 ? p : 0)) * v.c : nullptr,
            s_sums ? s_sums + (n * s_parts + (s_parts > 1 ? p : 0)) * v.p : nullptr,
            v.channels_last ? 0 : l0, v.channels_last ? v.c : l1, v.channels_last ? l0 : 0,
            v.channels_last ? l1 : v.p);
      }
    });
    auto finish = [&](A* sums, int64_t count, int64_t length, const Tensor& to) {
      if (!sums) return;
      A* whole = count > 1 ? arena.zeros<A>(v.n * length) : sums;
      if (count > 1)
        for (int64_t n = 0; n < v.n; ++n)
          for (int64_t p = 0; p < count; ++p)
            for (int64_t i = 0; i < length; ++i)
              whole[n * length + i] += sums[(n * count + p) * length + i];
      write_values<A>(whole, to, v.n * length);
    };
    finish(c_sums, c_parts, v.c, dc);
    finish(s_sums, s_parts, v.p, ds);
  });
}

void input_gradient(
    Tensor dout, Tensor x, Tensor c, Tensor s, Tensor dpooled, Tensor dreduced, Tensor weight,
    Tensor dx, Tensor dweight, Tensor dbias, int64_t combine, bool residual) {
  const View v = view_of(x, "x");
  const bool has_gate = !absent(dout), has_reduced = !absent(dreduced), has_dx = !absent(dx);
  View from{}, to{}, small{};
  if (has_gate) {
    check_dtype(dout, "dout", x.scalar_type()), check_shape(dout, "dout", {v.n, v.c, v.h, v.w});
    from = view_like(dout, "dout", v);
  }
  if (has_dx) {
    check_dtype(dx, "dx", x.scalar_type()), check_shape(dx, "dx", {v.n, v.c, v.h, v.w});
    to = view_like(dx, "dx", v);
  }
  if (has_reduced) {
    small = view_of(dreduced, "dreduced");
    check_shape(dreduced, "dreduced", {v.n, small.c, v.h, v.w});
  }
  const int64_t h = small.c;
  if (!absent(dweight)) {
    STD_TORCH_CHECK(has_reduced, "dreduced: expected a tensor for the weight's gradient, got none");
    check_tensor(dweight, "dweight"), check_contiguous(dweight, "dweight");
    check_shape(dweight, "dweight", {h, v.c});
  }
  if (!absent(dbias)) {
    check_tensor(dbias, "dbias"), check_contiguous(dbias, "dbias");
    check_shape(dbias, "dbias", {h});
  }
  if (x.numel() == 0) return;
  with_type(x.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using A = AccOf<S>;
    const Kernels<S>& k = kernels<S>();
    const WideKernels<A>& wide = wide_kernels<A>();
    Arena arena;
    const bool threads = threaded(v);
    std::vector<Gate<A>> gates;
    if (has_gate)
      gates = gates_of<A>(
          combine_of(combine), residual, v, read_logits<A>(c, s, v, arena), threads, arena);
    const A* w = has_reduced && has_dx ? values<A>(weight, "weight", {h, v.c}, arena) : nullptr;
    const A* pooled = values<A>(dpooled, "dpooled", {v.n, v.c}, arena);
    const int64_t ld = whole_vectors(h, k.lanes), size = v.p * ld;
    const int64_t line = whole_vectors(v.p, k.lanes);  // of a channel of a planar map
    const bool planar = has_dx && !v.channels_last;
    A* maps = has_reduced ? arena.take<A>(v.n * size) : nullptr;
    A* planes = has_reduced && planar ? arena.take<A>(v.n * h * line) : nullptr;
    parallel(threads, has_reduced ? v.n : 0, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        Arena own;
        load_hidden<A>(dreduced, small, n, maps + n * size, ld, own);
        if (planar)
          wide.transpose(maps + n * size, ld, v.p, h, planes + n * h * line, line, line);
      }
    });
    Packer<A> packer(arena);
    if (w) w = v.channels_last ? panels(w, h, v.c, arena) : packer.matrix(w, h, v.c, h);
    packer.run(threads);
    const int64_t parts = parts_of(v.n);
    parallel(threads, has_dx ? v.n * parts : 0, [&](int64_t begin, int64_t end) {
      Arena own;
      A* scratch = own.take<A>(k.gradient_scratch(v.c));
      A* mean = own.take<A>(v.c);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / parts;
        const Range r = positions(i % parts, parts, v.p, k.lanes);
        if (pooled)
          for (int64_t j = 0; j < v.c; ++j) mean[j] = pooled[n * v.c + j] / A(v.p);
        Gate<A> g{Map::channel, false, v.channels_last, nullptr, nullptr};
        if (has_gate) g = gates[size_t(n)];
        const InputGradient<S> all{
            has_gate ? data<S>(dout) + n * from.sample : nullptr,
            mutable_data<S>(dx) + n * to.sample, from.line, to.line, v.c, h,
            pooled ? mean : nullptr,
            !has_reduced ? nullptr : planar ? planes + n * h * line : maps + n * size,
            planar ? line : ld, w};
        k.input_gradient(g, all, r.begin, r.end, scratch);
      }
    });
    if (!absent(dweight)) {
      const WeightGradient<S> all{
          data<S>(x), v.sample, v.line, v.n, v.p, v.channels_last, maps, ld};
      A* dw = arena.take<A>(v.c * ld);
      // Blocks of channels in whole tiles, one a thread or more.
      const int64_t each = (v.c / (threads ? int64_t(torch::stable::get_num_threads()) : 1) + 12) / 12;
      const int64_t width = std::min(each * 12, kWeightChannels);
      parallel(threads, (v.c + width - 1) / width, [&](int64_t begin, int64_t end) {
        Arena own;
        A* scratch = own.take<A>(k.weight_gradient_scratch());
        for (int64_t i = begin; i < end; ++i)
          k.weight_gradient(all, i * width, std::min((i + 1) * width, v.c), dw, scratch);
      });
      A* turned = arena.take<A>(h * v.c);
      wide.transpose(dw, ld, v.c, h, turned, v.c, v.c);
      write_values<A>(turned, dweight, h * v.c);
    }
    if (!absent(dbias)) {
      A *each = arena.take<A>(v.n * ld), *db = arena.take<A>(h);
      parallel(threads, v.n, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n)
          wide.moments(maps + n * size, v.p, ld, nullptr, each + n * ld);
      });
      for (int64_t j = 0; j < h; ++j) {
        double total = 0;
        for (int64_t n = 0; n < v.n; ++n) total += double(each[n * ld + j]);
        db[j] = A(total);
      }
      write_values<A>(db, dbias, h);
    }
  });
}

void update_running(
    std::vector<Tensor> means, std::vector<Tensor> variances, std::vector<Tensor> counters,
    std::vector<Tensor> batch_means, std::vector<Tensor> batch_variances,
    std::vector<int64_t> counts, std::vector<double> momenta) {
  const size_t n = means.size();
  STD_TORCH_CHECK(
      variances.size() == n && counters.size() == n && batch_means.size() == n &&
          batch_variances.size() == n && counts.size() == n && momenta.size() == n,
      "update_running: expected lists of one length");
  for (size_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(
        counters[i].is_cpu() && counters[i].scalar_type() == ScalarType::Long &&
            counters[i].numel() == 1,
        "counters: expected an int64 scalar on the CPU, got ", counters[i].numel(),
        " elements of dtype ", int(counters[i].scalar_type()));
    int64_t* counter = static_cast<int64_t*>(counters[i].mutable_data_ptr());
    *counter += 1;
    const double given = momenta[i], count = double(counts[i]);
    auto run = [&](auto tag) {
      using A = decltype(tag);
      const int64_t width = means[i].numel();
      Arena arena;
      const A weight = given >= 0 ? A(given) : A(1) / A(*counter), rest = A(1) - weight;
      const A unbiased = A(count / (count - 1));
      auto move = [&](const Tensor& running, const Tensor& batch, A factor) {
        check_contiguous(running, "running statistics");
        const A* old = values<A>(running, "running statistics", {width}, arena);
        const A* now = values<A>(batch, "batch statistics", {width}, arena);
        A* moved = arena.take<A>(width);
        for (int64_t j = 0; j < width; ++j) moved[j] = rest * old[j] + weight * (now[j] * factor);
        write_values<A>(moved, running, width);
      };
      move(means[i], batch_means[i], A(1));
      move(variances[i], batch_variances[i], unbiased);
    };
    if (batch_means[i].scalar_type() == ScalarType::Double) run(double{});
    else run(float{});
  }
}

} // namespace bam
