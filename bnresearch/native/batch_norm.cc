// The passes of BatchNorm over [sets, rows, features], as custom calls of XLA: moments, the affine
// map with what stands behind it, and for the backward pass sums and the gradient of the input.
//
// Sums read the values once. Blocks that stay in the cache are reduced by themselves, and the
// blocks' results merged in double precision in their order, so that the result depends neither on
// the number of threads nor on who computed what. A vector instruction takes 16 floats: where a row
// is shorter, several rows, which lie behind each other, are taken as one wide row.

#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "parts.h"

namespace bnresearch {
namespace {

constexpr int64_t kLanes = 16;   // floats of a vector: one register of AVX-512, two of AVX2
constexpr int64_t kTile = 4;     // vectors that are summed at once: hides the latency of additions
constexpr int64_t kStrip = 8;    // rows of a tile between two visits to memory for its sums
constexpr int64_t kBlock = 1 << 16;  // floats of a block: 256 KiB
constexpr int64_t kFewest = 64;      // rows of a block, at least

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Truth __attribute__((vector_size(kLanes * sizeof(float))));

inline Vector Load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void Store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

// How rows of `features` floats are taken together and cut into blocks.
struct Plan {
  int64_t features, fold, width;  // width = features * fold: of a wide row
  int64_t count, rows, blocks;    // rows: of a block but the last one

  Plan(int64_t features, int64_t count) : features(features), count(count) {
    fold = kLanes / std::gcd(features, kLanes);
    while (features * fold < kLanes * kTile) fold *= 2;
    width = features * fold;
    int64_t wide = std::max(kFewest, kBlock / width);
    rows = fold * wide;
    blocks = (count + rows - 1) / rows;
  }
};

// body(sum, i, r) over the wide rows, for sums[outputs][width]: i is a column, r a row.
template <int kOutputs, typename Body>
void Columns(const Plan& plan, int64_t wide_rows, float* sums, const Body& body) {
  const int64_t vectors = plan.width / kLanes;
  std::memset(sums, 0, sizeof(float) * kOutputs * plan.width);
  auto tile = [&](auto constant, int64_t first, int64_t begin, int64_t end) {
    constexpr int64_t kVectors = decltype(constant)::value;
    Vector held[kOutputs][kVectors];
    for (int o = 0; o < kOutputs; ++o)
      for (int64_t v = 0; v < kVectors; ++v)
        held[o][v] = Load(sums + o * plan.width + (first + v) * kLanes);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t v = 0; v < kVectors; ++v) {
        Vector terms[kOutputs];
        body(terms, (first + v) * kLanes, r * plan.width);
        for (int o = 0; o < kOutputs; ++o) held[o][v] += terms[o];
      }
    }
    for (int o = 0; o < kOutputs; ++o)
      for (int64_t v = 0; v < kVectors; ++v)
        Store(sums + o * plan.width + (first + v) * kLanes, held[o][v]);
  };
  const int64_t strip = vectors > kTile ? kStrip : wide_rows;
  for (int64_t begin = 0; begin < wide_rows; begin += strip) {
    int64_t end = std::min(begin + strip, wide_rows), v = 0;
    for (; v + kTile <= vectors; v += kTile)
      tile(std::integral_constant<int64_t, kTile>(), v, begin, end);
    for (; v < vectors; ++v) tile(std::integral_constant<int64_t, 1>(), v, begin, end);
  }
}

// The sums of each feature over the rows that were taken together.
void Fold(const Plan& plan, const float* sums, double* totals) {
  std::fill_n(totals, plan.features, 0.0);
  for (int64_t k = 0; k < plan.fold; ++k)
    for (int64_t f = 0; f < plan.features; ++f) totals[f] += sums[k * plan.features + f];
}

// A vector per feature, once for each of the rows that are taken together; may start where it lies.
void Repeat(const Plan& plan, const float* from, float* to) {
  for (int64_t k = from == to; k < plan.fold; ++k)
    std::memcpy(to + k * plan.features, from, sizeof(float) * plan.features);
}

using Rows = ffi::Buffer<ffi::F32, 3>;     // [sets, rows, features]
using Vectors = ffi::Buffer<ffi::F32, 2>;  // [sets, features]

// Where a block lies: its set, its first value, its rows.
struct Block {
  int64_t set, start, rows;
  Block(const Plan& plan, int64_t number) {
    const int64_t index = number % plan.blocks;
    set = number / plan.blocks;
    start = (set * plan.count + index * plan.rows) * plan.features;
    rows = std::min(plan.rows, plan.count - index * plan.rows);
  }
};

// work(block, number of the block, scratch) for all blocks; scratch: `vectors` wide rows.
template <typename Work>
void InBlocks(ffi::ThreadPool& pool, int64_t sets, const Plan& plan, int64_t vectors,
              const Work& work) {
  const int64_t all = sets * plan.blocks;
  const int64_t parts = PartsFor(pool, all, 4.0 * sets * plan.count * plan.features);
  InParts(pool, parts, [&](int64_t part) {
    std::vector<float> scratch(vectors * plan.width);
    for (int64_t i = part * all / parts; i < (part + 1) * all / parts; ++i)
      work(Block(plan, i), i, scratch.data());
  });
}

// Mean and biased variance. In a block: the mean, then sums of deviations from it, whose own mean
// takes away what rounding left in the first one; blocks are merged as Chan et al. (1979) do.
void Moments(ffi::ThreadPool& pool, Rows x, Rows& out) {
  const int64_t sets = x.dimensions()[0], features = x.dimensions()[2];
  const Plan plan(features, x.dimensions()[1]);
  std::vector<double> found(sets * plan.blocks * 2 * features);
  InBlocks(pool, sets, plan, 3, [&](const Block& block, int64_t number, float* scratch) {
    const int64_t wide = block.rows / plan.fold, rest = block.rows % plan.fold;
    const float *data = x.typed_data() + block.start, *last = data + wide * plan.width;
    float *sums = scratch, *means = scratch + 2 * plan.width;
    double *first = found.data() + number * 2 * features, *second = first + features;
    Columns<1>(plan, wide, sums, [&](Vector* terms, int64_t i, int64_t row) {
      terms[0] = Load(data + row + i);
    });
    Fold(plan, sums, first);
    for (int64_t r = 0; r < rest; ++r)
      for (int64_t f = 0; f < features; ++f) first[f] += last[r * features + f];
    const double share = 1.0 / block.rows;
    for (int64_t f = 0; f < features; ++f) means[f] = static_cast<float>(first[f] * share);
    Repeat(plan, means, means);
    Columns<2>(plan, wide, sums, [&](Vector* terms, int64_t i, int64_t row) {
      Vector deviation = Load(data + row + i) - Load(means + i);
      terms[0] = deviation;
      terms[1] = deviation * deviation;
    });
    Fold(plan, sums, first);
    Fold(plan, sums + plan.width, second);
    for (int64_t r = 0; r < rest; ++r) {
      for (int64_t f = 0; f < features; ++f) {
        const double deviation = static_cast<double>(last[r * features + f]) - means[f];
        first[f] += deviation;
        second[f] += deviation * deviation;
      }
    }
    for (int64_t f = 0; f < features; ++f) {
      second[f] -= first[f] * first[f] * share;
      first[f] = means[f] + first[f] * share;
    }
  });
  for (int64_t set = 0; set < sets; ++set) {
    // Into the place of the first block.
    double *m = found.data() + set * plan.blocks * 2 * features, *squares = m + features;
    double seen = Block(plan, set * plan.blocks).rows;
    for (int64_t b = 1; b < plan.blocks; ++b) {
      const double *mean = m + b * 2 * features, *own = mean + features;
      const double rows = Block(plan, set * plan.blocks + b).rows, share = rows / (seen + rows);
      for (int64_t f = 0; f < features; ++f) {
        const double delta = mean[f] - m[f];
        squares[f] += own[f] + delta * delta * seen * share;
        m[f] += delta * share;
      }
      seen += rows;
    }
    float* mean = out.typed_data() + set * features;
    float* variance = mean + sets * features;
    for (int64_t f = 0; f < features; ++f) {
      mean[f] = static_cast<float>(m[f]);
      // Not max(): it would turn NaN into 0.
      variance[f] = static_cast<float>(squares[f] < 0 ? 0 : squares[f] / plan.count);
    }
  }
}

// y = (x - m) * a + b (+ added), and with `relu` the positive part of that.
struct Affine {
  Rows x;
  Vectors m, a, b;
  const float* added;
  Plan plan;
  int64_t sets;

  Affine(Rows x, Vectors m, Vectors a, Vectors b, const float* added)
      : x(x), m(m), a(a), b(b), added(added), plan(x.dimensions()[2], x.dimensions()[1]),
        sets(x.dimensions()[0]) {}

  // A vector of a set, once for each of the rows that are taken together.
  const float* Wide(Vectors& v, const Block& block, float* to) const {
    Repeat(plan, v.typed_data() + block.set * plan.features, to);
    return to;
  }
};

template <bool kRelu, bool kAdd>
void Apply(ffi::ThreadPool& pool, Affine in, float* out) {
  InBlocks(pool, in.sets, in.plan, 3, [&](const Block& block, int64_t, float* scratch) {
    const int64_t width = in.plan.width, size = block.rows * in.plan.features;
    const float *m = in.Wide(in.m, block, scratch), *a = in.Wide(in.a, block, scratch + width);
    const float *b = in.Wide(in.b, block, scratch + 2 * width);
    const float *x = in.x.typed_data() + block.start, *added = kAdd ? in.added + block.start : nullptr;
    float* to = out + block.start;
    for (int64_t row = 0; row < size; row += width) {
      const int64_t columns = std::min(width, size - row);
      for (int64_t j = 0; j < columns; ++j) {
        float y = (x[row + j] - m[j]) * a[j] + b[j];
        if (kAdd) y += added[row + j];
        if (kRelu) y = y < 0 ? 0 : y;  // NaN stays NaN
        to[row + j] = y;
      }
    }
  });
}

// Sums of g and of (x - m) * g; with `relu` only over the values with y > 0.
template <bool kRelu, bool kAdd>
void Sums(ffi::ThreadPool& pool, Affine in, const float* gradient, Rows& out) {
  const Plan& plan = in.plan;
  const int64_t features = plan.features;
  std::vector<double> found(in.sets * plan.blocks * 2 * features);
  InBlocks(pool, in.sets, plan, 5, [&](const Block& block, int64_t number, float* scratch) {
    const int64_t wide = block.rows / plan.fold, width = plan.width;
    const float *x = in.x.typed_data() + block.start, *g = gradient + block.start;
    const float *added = kAdd ? in.added + block.start : nullptr, *m = in.Wide(in.m, block, scratch + 2 * width);
    const float *a = in.Wide(in.a, block, scratch + 3 * width);
    const float *b = in.Wide(in.b, block, scratch + 4 * width);
    double *first = found.data() + number * 2 * features, *second = first + features;
    Columns<2>(plan, wide, scratch, [&](Vector* terms, int64_t i, int64_t row) {
      Vector centred = Load(x + row + i) - Load(m + i), kept = Load(g + row + i);
      if (kRelu) {
        Vector y = centred * Load(a + i) + Load(b + i);
        if (kAdd) y += Load(added + row + i);
        kept = (Vector)((Truth)kept & (y > 0.0f));
      }
      terms[0] = kept;
      terms[1] = centred * kept;
    });
    Fold(plan, scratch, first);
    Fold(plan, scratch + width, second);
    for (int64_t r = wide * plan.fold; r < block.rows; ++r) {
      for (int64_t f = 0; f < features; ++f) {
        const int64_t i = r * features + f;
        const float centred = x[i] - m[f];
        if (kRelu && !(centred * a[f] + b[f] + (kAdd ? added[i] : 0) > 0)) continue;
        first[f] += g[i];
        second[f] += static_cast<double>(centred) * g[i];
      }
    }
  });
  for (int64_t set = 0; set < in.sets; ++set) {
    double* totals = found.data() + set * plan.blocks * 2 * features;  // in the first block's place
    for (int64_t b = 1; b < plan.blocks; ++b)
      for (int64_t i = 0; i < 2 * features; ++i) totals[i] += totals[b * 2 * features + i];
    for (int64_t i = 0; i < 2 * features; ++i) {
      const int64_t half = i / features, f = i % features;
      out.typed_data()[(half * in.sets + set) * features + f] = static_cast<float>(totals[i]);
    }
  }
}

// The gradient of x, g * a + c + (x - m) * d; with `relu` g counts where y > 0 only, and that is
// given, too, as the gradient of what was added.
template <bool kRelu, bool kAdd>
void Spread(ffi::ThreadPool& pool, Affine in, const float* gradient, Vectors c, Vectors d,
            float* out, float* out_added) {
  InBlocks(pool, in.sets, in.plan, 5, [&](const Block& block, int64_t, float* scratch) {
    const int64_t width = in.plan.width, size = block.rows * in.plan.features;
    const float *m = in.Wide(in.m, block, scratch), *a = in.Wide(in.a, block, scratch + width);
    const float *b = in.Wide(in.b, block, scratch + 2 * width);
    const float *cs = in.Wide(c, block, scratch + 3 * width);
    const float *ds = in.Wide(d, block, scratch + 4 * width);
    const float *x = in.x.typed_data() + block.start, *g = gradient + block.start;
    const float* added = kAdd ? in.added + block.start : nullptr;
    float *to = out + block.start, *to_added = kAdd ? out_added + block.start : nullptr;
    for (int64_t row = 0; row < size; row += width) {
      const int64_t columns = std::min(width, size - row);
      for (int64_t j = 0; j < columns; ++j) {
        const float centred = x[row + j] - m[j];
        float kept = g[row + j];
        if (kRelu) {
          float y = centred * a[j] + b[j];
          if (kAdd) y += added[row + j];
          kept = y > 0 ? kept : 0;
        }
        to[row + j] = kept * a[j] + (cs[j] + centred * ds[j]);
        if (kAdd) to_added[row + j] = kept;
      }
    }
  });
}

// Calls function(relu, add), both known to the compiler. Without relu what is added changes no
// derivative, and its gradient is g itself.
template <typename Function>
void Choose(bool relu, bool add, const Function& function) {
  using std::false_type, std::true_type;
  if (relu && add) return function(true_type(), true_type());
  if (relu) return function(true_type(), false_type());
  if (add) return function(false_type(), true_type());
  function(false_type(), false_type());
}

const float* Added(ffi::RemainingArgs rest) {
  return rest.size() ? rest.get<Rows>(0)->typed_data() : nullptr;
}

constexpr char kWho[] = "BatchNorm";

ffi::Error MomentsCall(ffi::ThreadPool pool, Rows x, ffi::Result<Rows> out) {
  return Guarded(kWho, [&] { Moments(pool, x, *out); });
}

ffi::Error ApplyCall(ffi::ThreadPool pool, Rows x, Vectors m, Vectors a, Vectors b,
                     ffi::RemainingArgs rest, ffi::Result<Rows> y, bool relu) {
  return Guarded(kWho, [&] {
    const float* added = Added(rest);
    AskForLargePages(y->typed_data(), y->size_bytes());
    Choose(relu, added, [&](auto relu, auto add) {
      Apply<relu, add>(pool, Affine(x, m, a, b, added), y->typed_data());
    });
  });
}

ffi::Error SumsCall(ffi::ThreadPool pool, Rows x, Rows g, Vectors m, Vectors a, Vectors b,
                    ffi::RemainingArgs rest, ffi::Result<Rows> sums, bool relu) {
  return Guarded(kWho, [&] {
    const float* added = Added(rest);
    Choose(relu, added, [&](auto relu, auto add) {
      Sums<relu, add>(pool, Affine(x, m, a, b, added), g.typed_data(), *sums);
    });
  });
}

ffi::Error SpreadCall(ffi::ThreadPool pool, Rows x, Rows g, Vectors m, Vectors a, Vectors b,
                      Vectors c, Vectors d, ffi::RemainingArgs rest, ffi::Result<Rows> dx,
                      ffi::RemainingRets more, bool relu) {
  return Guarded(kWho, [&] {
    const float* added = Added(rest);
    AskForLargePages(dx->typed_data(), dx->size_bytes());
    float* dadded = nullptr;
    if (more.size()) {
      ffi::Result<Rows> second = *more.get<Rows>(0);
      dadded = second->typed_data();
      AskForLargePages(dadded, second->size_bytes());
    }
    Choose(relu, added, [&](auto relu, auto add) {
      Spread<relu, add>(pool, Affine(x, m, a, b, added), g.typed_data(), c, d, dx->typed_data(),
                        dadded);
    });
  });
}

auto Bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(norm_moments, MomentsCall, Bind().Arg<Rows>().Ret<Rows>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(norm_apply, ApplyCall,
                              Bind()
                                  .Arg<Rows>()
                                  .Arg<Vectors>()
                                  .Arg<Vectors>()
                                  .Arg<Vectors>()
                                  .RemainingArgs()
                                  .Ret<Rows>()
                                  .Attr<bool>("relu"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(norm_sums, SumsCall,
                              Bind()
                                  .Arg<Rows>()
                                  .Arg<Rows>()
                                  .Arg<Vectors>()
                                  .Arg<Vectors>()
                                  .Arg<Vectors>()
                                  .RemainingArgs()
                                  .Ret<Rows>()
                                  .Attr<bool>("relu"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(norm_spread, SpreadCall,
                              Bind()
                                  .Arg<Rows>()
                                  .Arg<Rows>()
                                  .Arg<Vectors>()
                                  .Arg<Vectors>()
                                  .Arg<Vectors>()
                                  .Arg<Vectors>()
                                  .Arg<Vectors>()
                                  .RemainingArgs()
                                  .Ret<Rows>()
                                  .RemainingRets()
                                  .Attr<bool>("relu"));

}  // namespace bnresearch
